"""Times each kernel against its reference, torch.compile, and what no kernel can do without, at a model's sizes.

    python tools/benchmarks/benchmark_kernels.py configs/demo.yml --vocab-size 512
    python tools/benchmarks/benchmark_kernels.py -d configs tokenformer/150M data/pile --vocab-size 50277 --rows 8192

Forward and backward pass, of one micro batch's tensors. Contenders take turns, so that a machine that gets slower or
faster does so for all; the first round, untimed, is for compiling and waking up. On a CPU, Triton's kernels are left
out: their interpreter tells what they compute, not how fast.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from megatron_tokenformer import run_tool

from megatron.config.sections.run_config import RunConfig
from tools.benchmarks.benchmark_command import benchmark_parser, run_benchmark
from tools.command_line import positive

if TYPE_CHECKING:
    from tools.benchmarks.kernel_cases import Case


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options; returns the remaining words too, which are YAML files and overrides."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=positive, help="tokens of the micro batch (default: one sequence)")
    parser.add_argument(
        "--skip", nargs="*", default=[], metavar="NAME", help="contenders to leave out, such as compile or reference"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="measure the cases whose names hold this")
    return parser.parse_known_args(argv)


def benchmark(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Measures all cases. Returns what the JSON file holds."""
    # torch's profiler, which counts memory on CPUs, writes a line for each start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import torch

    from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
    from megatron.monitor.provenance import device_name, git_commit
    from tools.benchmarks.kernel_cases import Cases

    rows = args.rows or config.model.seq_length
    actual = args.vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    cases = Cases(config, rows, padded_vocab_size(config.model, actual), args.skip)
    return {
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "dtype": config.training.precision.dtype,
        "versions": {"torch": version("torch")},
        "commit": git_commit(),
        "rows": rows,
        "hidden_size": config.model.hidden_size,
        "rounds": args.rounds,
        "cases": [measure(case, args.rounds) for case in cases.all() if args.only in case.name],
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times a case's calls by turns, and takes the peak memory of each; ratios are to those of the baseline."""
    from tools.benchmarks.peak_memory import peak_bytes
    from tools.benchmarks.turns import seconds_by_turns

    seconds, answers = seconds_by_turns(case.calls, rounds)
    memory = {name: peak_bytes(call) for name, call in case.calls.items()}
    contenders = {}
    for name, values in seconds.items():
        ratios = [own / other for own, other in zip(values, seconds[case.baseline], strict=True)]
        contenders[name] = {
            "seconds": values,
            "ratio": statistics.median(ratios),
            "peak_bytes": memory[name],
            "peak_ratio": memory[name] / memory[case.baseline],
            "difference": None if name == case.limit else largest_difference(answers[name], answers[case.baseline]),
            "flops_per_second": case.flops and case.flops / min(values),
            "bytes_per_second": case.bytes_moved and case.bytes_moved / min(values),
        }
    return {
        "case": case.name,
        "baseline": case.baseline,
        "limit": case.limit,
        "contenders": contenders,
        "left_out": case.left_out,
    }


def largest_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Returns the largest difference of any result, relative to the norm of the baseline's."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def table(report: dict[str, Any]) -> str:
    """Formats the report as a table."""
    where = f"{report['cpu_threads']} CPU threads" if report["device"] == "cpu" else report["device"]
    lines = [
        f"{report['rows']} rows of {report['hidden_size']}, {report['dtype']}, {where}, "
        f"torch {report['versions']['torch']}, {report['rounds']} rounds"
    ]
    for case in report["cases"]:
        title = f"{case['case']} (ratios to {case['baseline']})"
        lines += ["", f"{title:44}{'ms':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'rate':>14}{'difference':>12}"]
        for name, found in case["contenders"].items():
            rate = "" if found["flops_per_second"] is None else f"{found['flops_per_second'] / 1e12:.2f} TFLOP/s"
            rate = rate if found["bytes_per_second"] is None else f"{found['bytes_per_second'] / 1e9:.1f} GB/s"
            difference = "limit" if found["difference"] is None else f"{found['difference']:.1e}"
            lines.append(
                f"  {name:42}{min(found['seconds']) * 1e3:>9.2f}{found['ratio']:>8.2f}"
                f"{found['peak_bytes'] / 2**20:>10.1f}{found['peak_ratio']:>8.2f}{rate:>14}{difference:>12}"
            )
        lines += [f"  {name}: left out, {reason}" for name, reason in case["left_out"].items()]
    if report["device"] == "cpu":
        lines += ["", "Times of a CPU say nothing about a GPU; peak memory does."]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    return run_benchmark(*parse_args(argv), benchmark, table)


if __name__ == "__main__":
    run_tool(main)
