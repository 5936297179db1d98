"""Measurements on a GPU, most important first: commands, what each decides, and what is read from their reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

Figures = dict[str, float | str]
OFF = ("pattention=eager", "rotary=eager", "fused_cross_entropy=off")


@dataclass(frozen=True)
class Measurement:
    """One row: a command of this project's, which may write a JSON report."""

    name: str
    decides: str
    """The question that it answers, with the figure that is hoped for."""
    arguments: tuple[str, ...]
    """Words after `python`. `{report}` stands for the path of the report."""
    minutes: float
    """After this long it is ended [minutes]."""
    figures: Callable[[Mapping[str, Any]], Figures] | None = None
    """Reads what the table shows from the report; None where the exit code is all."""


def measurements() -> Iterator[Measurement]:
    """Yields all measurements, most important first."""
    # Without TRITON_INTERPRET they run on the GPU, where they are compiled: see tests/conftest.py.
    tests = ("-m", "pytest", "-q", "-p", "no:xdist", "-m", "not full", "tests/unit/kernels")
    yield Measurement("kernels are right", "Outputs and gradients of every kernel that the GPU compiles.", tests, 10)
    yield _training("150M", "all speed-ups", "45 % MFU or more, floor 40 %.", 16)
    yield _training("150M", "plain operations", "What the speed-ups give together.", 16, *OFF)
    yield _peers("150M", 8)
    yield _kernels("150M", 16384)
    yield _training("1-5B", "all speed-ups", "52 % MFU or more, floor 48 %.", 8)
    yield _training("1-5B", "plain operations", "What the speed-ups give together at 1.5B.", 8, *OFF)
    yield _peers("450M", 4)  # at 1.5B the four of them do not fit on one GPU
    yield _kernels("1-5B", 8192)
    for choice in OFF:
        yield _training("150M", f"all but {choice}", "What this one gives.", 16, choice)
    yield _training("150M", "scores recomputed", "Time that 44 % less activations cost.", 16, "recompute_scores=true")
    yield _training(
        "150M", "compiled Pattention", "Triton's kernels against torch.compile's.", 16, "pattention=compile"
    )
    yield _training("150M", "compiled layers", "What torch.compile adds to the kernels.", 16, "torch_compile=on")
    gpu = ("-m", "pytest", "-q", "-p", "no:xdist", "-m", "gpu", "tests/unit")
    yield Measurement("other GPU tests", "Everything else that needs a GPU.", gpu, 5)


def _peers(size: str, micro_batch: int) -> Measurement:
    decides = "2 times the published operations; no slower than a Transformer."
    row = _training(size, "beside its peers", decides, micro_batch)
    return replace(row, arguments=(*row.arguments, "--peers"), minutes=15, figures=_peer_figures)


def _peer_figures(report: Mapping[str, Any]) -> Figures:
    peers = {name: result for name, result in report["results"].items() if name != "engine"}
    return {f"faster than {name}": round(result["engine_is_faster"], 2) for name, result in peers.items()}


def _training(size: str, variant: str, decides: str, micro_batch: int, *choices: str) -> Measurement:
    words = (
        "tools/benchmarks/benchmark_training.py",
        f"configs/tokenformer/{size}.yml",
        "precision=bfloat16",
        "checkpoint_activations=false",
        f"train_micro_batch_size_per_gpu={micro_batch}",
        f"train_batch_size={micro_batch}",
        *choices,
    )
    flags = ("--vocab-size", "50277", "--rounds", "4", "--output", "{report}")
    return Measurement(f"train {size}, {variant}", decides, (*words, *flags), 8, _training_figures)


def _training_figures(report: Mapping[str, Any]) -> Figures:
    engine = report["results"]["engine"]
    figures: Figures = {
        "tokens/s": round(engine["tokens_per_second"]),
        "peak GiB": round(engine["peak_memory_gib"], 1),
        "over plain torch": round(report["ratio"], 2),
    }
    return figures if engine["mfu"] is None else figures | {"MFU %": round(100 * engine["mfu"], 1)}


def _kernels(size: str, rows: int) -> Measurement:
    words = ("tools/benchmarks/benchmark_kernels.py", f"configs/tokenformer/{size}.yml", "precision=bfloat16")
    flags = ("--vocab-size", "50277", "--rows", str(rows), "--rounds", "10", "--output", "{report}")
    decides = "Row kernels at 85 % of a copy's rate; each kernel against torch.compile."
    return Measurement(f"kernels at {size}", decides, (*words, *flags), 8, _kernel_figures)


def _kernel_figures(report: Mapping[str, Any]) -> Figures:
    figures: Figures = {}
    for case in report["cases"]:
        contenders = case["contenders"]
        best = "triton" if "triton" in contenders else "in chunks" if "in chunks" in contenders else case["baseline"]
        seconds = {name: min(found["seconds"]) for name, found in contenders.items()}
        figures[f"{case['case']}: {best} over {case['baseline']}"] = round(seconds[case["baseline"]] / seconds[best], 2)
        if case["limit"]:
            figures[f"{case['case']}: share of the limit"] = round(seconds[case["limit"]] / seconds[best], 2)
    return figures
