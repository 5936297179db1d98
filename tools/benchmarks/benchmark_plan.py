"""Compares the plan's memory and time with what training takes on this machine, for six small configurations.

    OMP_NUM_THREADS=1 python deepy.py train.py configs/demo.yml --calibrate
    OMP_NUM_THREADS=1 python tools/benchmarks/benchmark_plan.py --output tools/benchmarks/results/plan_cpu.json

Memory is the peak of a rank's resident memory less what it had after its imports. Time is the median of steps that the
configurations take in turn; by a process's own time, where it has one thread, so that others on the machine do not
count. Each configuration trains on random tokens, in processes that are forked from one that has imported everything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.local_path import local_path
from megatron.errors import EnvironmentSetupError
from megatron.planner.plan import make_plan
from megatron.planner.target import find_target
from tools.command_line import positive, tool_parser

GIB = 2**30
FOUR_LAYERS, TWO_LAYERS = 'attention_config=[[["tokenformer"], 4]]', 'attention_config=[[["flash"], 2]]'
TOKENFORMER = ("configs/tokenformer/150M.yml", "fp16=null", "train_batch_size=null", FOUR_LAYERS)
NEOX = ("configs/pythia/160M.yml", "fp16=null", "train_batch_size=null", TWO_LAYERS)
LLAMA = ("configs/llama/tiny.yml", "train_batch_size=null")


@dataclass(frozen=True)
class Case:
    """A configuration that is small enough for a CPU and seconds, and dominated by one part of memory."""

    words: tuple[str, ...]
    ranks: int = 1


def sizes(layers: int, hidden: int, length: int, micro: int, vocabulary: int) -> tuple[str, ...]:
    """Returns overrides for a model and a batch."""
    return (
        *(f"num_layers={layers}", f"hidden_size={hidden}", f"num_attention_heads={hidden // 64}"),
        *(f"seq_length={length}", f"max_position_embeddings={length}", f"padded_vocab_size={vocabulary}"),
        *(f"train_micro_batch_size_per_gpu={micro}", "checkpoint_activations=false"),
    )


def tokens(hidden: int) -> tuple[str, ...]:
    """Returns overrides for the published numbers of parameter tokens."""
    return (f"qkv_slot_num={hidden}", f"proj_slot_num={hidden}", f"ffn_slot_num={4 * hidden}")


SMALL = (*TOKENFORMER, *sizes(4, 512, 128, 1, 8192), *tokens(512))
CASES = {
    "weights, fp32": Case((*SMALL, "precision=fp32")),
    "weights, bf16, 2 micro batches": Case((*SMALL, "precision=bfloat16", "gradient_accumulation_steps=2")),
    "activations, fp32": Case((*TOKENFORMER, *sizes(4, 128, 512, 16, 2048), *tokens(128), "precision=fp32")),
    "logits, fp32 (Pythia)": Case((*NEOX, *sizes(2, 128, 512, 2, 50304), "precision=fp32")),
    "layers computed again, fp32 (LLaMA)": Case(
        (
            *(*LLAMA, *sizes(4, 512, 256, 1, 8192), "num_kv_heads=4", "ffn_hidden_size=1408", "precision=fp32"),
            *("gradient_accumulation_steps=1", "checkpoint_activations=true"),
        )
    ),
    "weights, fp32, 2 data-parallel ranks": Case((*SMALL, "precision=fp32"), ranks=2),
}


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    args = parse_args(argv)
    report = benchmark(args.rounds)
    print(table(report))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(args.output)
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=3, help="timed steps of each configuration (3)")
    parser.add_argument("--output", type=local_path, help="JSON file to write")
    return parser.parse_args(argv)


def benchmark(rounds: int) -> dict[str, Any]:
    """Runs all cases in turn; returns what the JSON file holds."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Everything that a rank imports, so that it is in every rank's baseline.
    from tools.benchmarks import plan_process

    load = [os.getloadavg()[0]]
    loaded = {name: load_config([Path(case.words[0])], case.words[1:]) for name, case in CASES.items()}
    with ExitStack() as stack:
        ranks = {name: [stack.enter_context(rank) for rank in start(name, loaded[name])] for name in CASES}
        seconds: dict[str, list[float]] = {name: [] for name in CASES}
        # The first step, which makes the optimizer's state, does not count.
        for number in range(rounds + 1):
            for name in list(CASES)[:: 1 if number % 2 else -1]:
                for rank in ranks[name]:
                    rank.connection.send("step")
                seconds[name].append(max(rank.receive() for rank in ranks[name]))
        memory = {name: max(rank.ask("memory") for rank in ranks[name]) for name in CASES}
    load.append(os.getloadavg()[0])
    results = {name: compare(name, loaded[name], seconds[name][1:], memory[name]) for name in CASES}
    return {
        "host": socket.gethostname(),
        "threads": plan_process.threads(),
        "load_before_and_after": load,
        "results": results,
    }


def compare(name: str, loaded: LoadedConfig, seconds: list[float], memory: float) -> dict[str, Any]:
    """Puts the plan of a case beside what was measured."""
    run, ranks = loaded.run, CASES[name].ranks
    target = find_target("cpu", run.launch, ranks, run.training.precision.dtype)
    plan = make_plan(run, loaded.batch(ranks), ranks, run.model.padded_vocab_size or 0, target)
    measured = statistics.median(seconds)
    return {
        "words": list(CASES[name].words),
        "ranks": ranks,
        "peak": plan.largest.peak_moment,
        "predicted_gib": plan.largest.peak / GIB,
        "measured_gib": memory / GIB,
        "memory_ratio": plan.largest.peak / memory,
        "predicted_seconds": plan.step.total,
        "measured_seconds": measured,
        "all_seconds": seconds,
        "time_ratio": plan.step.total / measured,
        "rates": target.rates.source,
    }


def table(report: dict[str, Any]) -> str:
    """Lays the report out as a table."""
    before, after = report["load_before_and_after"]
    lines = [
        f"{report['host']}, {report['threads']} threads a rank, load {before:.1f} before and {after:.1f} after; rates "
        f"{' and '.join(dict.fromkeys(one['rates'] for one in report['results'].values()))}",
        f"{'':38}{'memory [GiB]':>24}{'':>7}{'step [s]':>22}",
        f"{'':38}{'predicted':>12}{'measured':>12}{'ratio':>7}{'predicted':>12}{'measured':>10}{'ratio':>7}",
    ]
    for name, one in report["results"].items():
        lines.append(
            f"{name:38}{one['predicted_gib']:>12.3f}{one['measured_gib']:>12.3f}{one['memory_ratio']:>7.2f}"
            f"{one['predicted_seconds']:>12.3f}{one['measured_seconds']:>10.3f}{one['time_ratio']:>7.2f}"
        )
    return "\n".join(lines)


class Rank:
    """A rank of a case, in a process of its own."""

    def __init__(self, name: str, loaded: LoadedConfig, rank: int, port: int) -> None:
        from tools.benchmarks import plan_process

        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._name = f"{name}, rank {rank}"
        arguments = (loaded, rank, CASES[name].ranks, port, theirs)
        self._process = context.Process(target=plan_process.serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *failure: object) -> None:
        self.connection.close()
        self._process.join(timeout=60)
        self._process.kill()

    def ask(self, request: str) -> float:
        """Returns the answer to a request."""
        self.connection.send(request)
        return self.receive()

    def receive(self) -> float:
        """Returns an answer. Raises EnvironmentSetupError when the process has died."""
        try:
            return float(self.connection.recv())
        except EOFError as error:
            raise EnvironmentSetupError(f"{self._name}: its process ended; the reason stands above.") from error


def start(name: str, loaded: LoadedConfig) -> list[Rank]:
    """Starts the ranks of a case, and waits until they are ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [Rank(name, loaded, rank, port) for rank in range(CASES[name].ranks)]
    for rank in ranks:
        rank.receive()
    return ranks


if __name__ == "__main__":
    run_tool(main)
