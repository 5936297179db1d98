"""Times training through this project's engine against a plain torch loop of the same model.

    python tools/benchmarks/benchmark_training.py configs/demo.yml --output benchmark.json
    python tools/benchmarks/benchmark_training.py a.yml b.yml train_batch_size=8 --vocab-size 50277
    python tools/benchmarks/benchmark_training.py configs/tokenformer/150M.yml --peers --compiled --vocab-size 50277

Both train one rank from the same initial weights on the same random tokens, so no dataset is needed, and with
--vocab-size no tokenizer. Each runs in a process of its own, which keeps their memory apart; they take turns in blocks
of steps, so that a machine that gets slower or faster does so for both. On a CPU that others use as well, ratios of
processor time say more than those of the clock: take one thread (OMP_NUM_THREADS=1), which never waits for another.

With --peers a TokenFormer is timed beside others: the same model by the operations of the published code, with and
without recomputation of layers, which the published runs had, and a Transformer of as many parameters, here and in
`transformers`. Those loops are plain torch as well. --compiled adds engine and published operations with compiled
layers, whose first step takes minutes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.command_line import CommandLine, parse_command_line
from megatron.config.load_config import LoadedConfig, load_config
from megatron.errors import ConfigError, EnvironmentSetupError, UserError
from megatron.monitor.format_quantities import format_count
from tools.benchmarks.benchmark_command import benchmark_parser, write_report
from tools.benchmarks.peers import COMPILED, PEERS, require_tokenformer
from tools.command_line import positive

NAMES = ("engine", "plain torch")


@dataclass(frozen=True)
class Settings:
    """Extent of a measurement."""

    command: CommandLine
    steps: int
    """Optimizer steps per block."""
    rounds: int
    """Timed blocks per contender."""
    vocab_size: int | None
    """Ids of the vocabulary; None asks the tokenizer."""
    names: tuple[str, ...] = NAMES
    """Contenders, the first of which the others are compared with."""


def parse_args(argv: Sequence[str]) -> tuple[Settings, Path | None]:
    """Parses the settings, and the path of the report."""
    parser = benchmark_parser(__doc__, rounds=8)
    parser.add_argument("--steps", type=positive, default=5, help="optimizer steps per block (default: 5)")
    parser.add_argument("--peers", action="store_true", help="time a TokenFormer beside its peers")
    parser.add_argument("--compiled", action="store_true", help="with --peers: compiled layers too")
    args, words = parser.parse_known_args(argv)
    if args.compiled and not args.peers:
        parser.error("--compiled: belongs to --peers")
    names = (*PEERS, *(COMPILED if args.compiled else ())) if args.peers else NAMES
    return Settings(parse_command_line(words), args.steps, args.rounds, args.vocab_size, names), args.output


def benchmark(settings: Settings) -> dict[str, Any]:
    """Runs the contenders in turn. Returns what the JSON file holds.

    Raises ConfigError for a configuration that needs more than one rank, and what training itself would raise.
    """
    loaded, names = load_config(settings.command.files, settings.command.overrides), settings.names
    require_one_rank(loaded)
    if names != NAMES:
        require_tokenformer(loaded.run.model)
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, settings)) for name in names}
        descriptions = {name: worker.receive() for name, worker in workers.items()}
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        # The first block, untimed, is for compiling, allocating and waking up.
        for number in range(settings.rounds + 1):
            # Whoever goes first in one round goes last in the next: a steady drift then favours neither.
            for name in names if number % 2 else reversed(names):
                blocks[name].append(workers[name].ask("run"))
        memory = {name: workers[name].ask("memory") for name in names}
    if names != NAMES:
        return summarize_peers(descriptions, blocks, memory, settings.steps)
    return summarize(descriptions["engine"], blocks, memory, settings.steps)


def require_one_rank(loaded: LoadedConfig) -> None:
    """Raises ConfigError for a configuration that needs more than one rank."""
    parallel = loaded.run.parallel
    if parallel.model_parallel_size * parallel.pipe_parallel_size != 1:
        raise ConfigError(
            f"model_parallel_size={parallel.model_parallel_size}, pipe_parallel_size={parallel.pipe_parallel_size}: "
            "a plain torch loop runs on one rank. Add model_parallel_size=1 pipe_parallel_size=1 to compare there."
        )


class Worker:
    """Contender in a process of its own."""

    def __init__(self, name: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, settings, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *failure: object) -> None:
        self._connection.close()
        self._process.join(timeout=30)
        self._process.kill()

    def ask(self, request: str) -> Any:
        self._connection.send(request)
        return self.receive()

    def receive(self) -> Any:
        """Returns the worker's answer. Raises its UserError, or EnvironmentSetupError when it has died."""
        try:
            answer = self._connection.recv()
        except EOFError as error:
            raise EnvironmentSetupError(f"{self._name}: its process ended; the reason stands above.") from error
        if isinstance(answer, UserError):
            raise answer
        return answer


def serve(name: str, settings: Settings, connection: Connection) -> None:
    """Prepares the environment of a worker's own process, then answers requests until the connection closes."""
    # Whatever launcher started the benchmark, each worker is alone in its world.
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    # DeepSpeed, which this imports, asks which accelerator was prepared.
    from tools.benchmarks.contender_process import answer_requests

    try:
        answer_requests(name, settings, connection)
    except UserError as error:
        connection.send(error)


def summarize(
    description: dict[str, Any], blocks: dict[str, list[dict[str, Any]]], memory: dict[str, float], steps: int
) -> dict[str, Any]:
    """Computes rates from the timed blocks, and how far the two trainings agree.

    The ratio is taken round by round, within which little drifts, and its median over the rounds.
    """
    results = {name: measured(description, blocks[name], memory[name], steps) for name in NAMES}
    step_seconds = {name: result["step_seconds"] for name, result in results.items()}
    ratios = [plain / engine for engine, plain in zip(step_seconds["engine"], step_seconds["plain torch"], strict=True)]
    processor = zip(*(results[name]["processor_seconds"] for name in NAMES), strict=True)
    losses = {name: [loss for block in blocks[name] for loss in block["losses"]] for name in NAMES}
    return description | {
        "steps_per_block": steps,
        "results": results,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "processor_ratio": statistics.median(plain / engine for engine, plain in processor),
        "first_loss": {name: losses[name][0] for name in NAMES},
        "largest_loss_difference": max(
            abs(a - b) for a, b in zip(losses["engine"], losses["plain torch"], strict=True)
        ),
    }


def measured(
    description: dict[str, Any], blocks: list[dict[str, Any]], memory: float, steps: int
) -> dict[str, Any]:  # fmt: skip
    """Computes the rates of one contender from its blocks, the first of which is not timed."""
    tokens = description["micro_batch_size"] * description["gradient_accumulation_steps"] * description["seq_length"]
    seconds = [block["seconds"] / steps for block in blocks[1:]]
    rate, peak = 1.0 / statistics.median(seconds), description["peak_flops"]
    return {
        "steps_per_second": rate,
        "tokens_per_second": rate * tokens,
        "step_seconds": seconds,
        "processor_seconds": [block["processor_seconds"] / steps for block in blocks[1:]],
        "peak_memory_gib": memory,
        "mfu": None if peak is None else rate * tokens * description["flops_per_token"] / peak,
    }


def summarize_peers(
    descriptions: dict[str, dict[str, Any]],
    blocks: dict[str, list[dict[str, Any]]],
    memory: dict[str, float],
    steps: int,
) -> dict[str, Any]:
    """Computes rates as `summarize` does, and of each peer by how much the engine is faster, in tokens by time.

    The first loss tells that the engine and the published operations compute the same model.
    """
    results = {}
    for name, description in descriptions.items():
        results[name] = measured(description, blocks[name], memory[name], steps)
        pairs = zip(results["engine"]["step_seconds"], results[name]["step_seconds"], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        own = zip(results["engine"]["processor_seconds"], results[name]["processor_seconds"], strict=True)
        results[name] |= {
            "processor_ratio": statistics.median(theirs / ours for ours, theirs in own),
            "parameters": description["parameters"],
            "engine_is_faster": statistics.median(ratios),
            "ratios": ratios,
            "first_loss": blocks[name][0]["losses"][0],
        }
    return descriptions["engine"] | {"steps_per_block": steps, "results": results}


def peers_table(report: dict[str, Any]) -> str:
    """Formats the report on peers as a table."""
    columns = f"{'':26}{'parameters':>11}{'tokens/s':>10}{'step [ms]':>11}{'MFU':>7}{'GiB':>7}  engine is faster by"
    on_cpu = report["device"] == "cpu"
    columns += ", in processor time" if on_cpu else ""
    lines = [*heading(report, rounds=len(report["results"]["engine"]["ratios"])), "", columns]
    for name, result in report["results"].items():
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
        ratios = result["ratios"]
        faster = f"{result['engine_is_faster']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        faster += f", {result['processor_ratio']:.3f}" if on_cpu else ""
        memory = f"{result['peak_memory_gib']:.2f}"
        lines.append(
            f"{name:26}{format_count(result['parameters']):>11}{format_count(result['tokens_per_second']):>10}"
            f"{1e3 * statistics.median(result['step_seconds']):>11.1f}{mfu:>7}{memory:>7}  {faster}"
        )
    ours, theirs = (report["results"][name]["first_loss"] for name in PEERS[:2])
    return "\n".join([*lines, "", f"first loss: engine {ours:.6f}, published operations {theirs:.6f}"])


def heading(report: dict[str, Any], rounds: int) -> list[str]:
    """Formats what was measured, and where."""
    where = f"{report['cpu_threads']} CPU threads" if report["device"] == "cpu" else report["device"]
    return [
        f"{' '.join(report['config'])}: {format_count(report['parameters'])} parameters, {report['dtype']}, {where}, "
        f"torch {report['torch']}",
        f"{report['micro_batch_size']} samples x {report['gradient_accumulation_steps']} micro batches of "
        f"{report['seq_length']} tokens per step; median of {rounds} blocks of {report['steps_per_block']} steps",
    ]


def table(report: dict[str, Any]) -> str:
    """Formats the report as a table."""
    memory = "peak resident memory" if report["device"] == "cpu" else "peak GPU memory"
    lines = [
        *heading(report, rounds=len(report["ratios"])),
        "",
        f"{'':12}{'steps/s':>10}{'tokens/s':>12}{'step [ms]':>12}{'fastest':>10}{'slowest':>10}{'MFU':>8}  {memory}",
    ]
    for name, result in report["results"].items():
        seconds = result["step_seconds"]
        mfu = "-" if result["mfu"] is None else f"{result['mfu']:.1%}"
        lines.append(
            f"{name:12}{result['steps_per_second']:>10.3f}{format_count(result['tokens_per_second']):>12}"
            f"{1e3 * statistics.median(seconds):>12.1f}{1e3 * min(seconds):>10.1f}{1e3 * max(seconds):>10.1f}{mfu:>8}"
            f"  {result['peak_memory_gib']:.2f} GiB"
        )
    ratios = report["ratios"]
    return "\n".join(
        [
            *lines,
            "",
            f"engine over plain torch, steps/s: {report['ratio']:.3f} (rounds: {min(ratios):.3f} to {max(ratios):.3f})",
            *processor_line(report),
            f"largest difference of their losses: {report['largest_loss_difference']:.2g}, "
            f"of {report['first_loss']['plain torch']:.4f} at the first step",
        ]
    )


def processor_line(report: dict[str, Any]) -> list[str]:
    """Formats the ratio of processor times, where the processor is what computes."""
    return [f"in processor time: {report['processor_ratio']:.3f}"] if report["device"] == "cpu" else []


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    settings, output = parse_args(argv)
    report = benchmark(settings)
    print(peers_table(report) if settings.names != NAMES else table(report))
    write_report(report, output)
    return 0


if __name__ == "__main__":
    run_tool(main)
