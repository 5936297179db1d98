"""Times what training waits for when it saves and loads, on one rank.

    python tools/benchmarks/benchmark_checkpoints.py configs/tokenformer/150M.yml precision=fp32 seq_length=128 \\
        train_batch_size=1 train_micro_batch_size_per_gpu=1 --vocab-size 50277 --output checkpoints.json

Trains on random tokens, so no dataset is needed, and with --vocab-size no tokenizer. Checkpoints go to a folder that is
deleted at the end, in the current one or in --folder: that disk is measured. What is read was written just before, and
comes from memory where the machine has enough of it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.command_line import parse_command_line
from megatron.config.load_config import load_config
from megatron.config.local_path import local_path
from megatron.monitor.format_quantities import format_count
from tools.benchmarks.benchmark_command import benchmark_parser, write_report
from tools.benchmarks.benchmark_training import Settings, require_one_rank

MEANINGS = {
    "step": "without a save, before and after it",
    "synchronous save": "training waits",
    "asynchronous save: copy": "training waits",
    "asynchronous save: publish": "training waits",
    "asynchronous save: in the background": "training goes on",
    "step while a save is written": "on the same processor cores",
    "verify": "sizes and SHA-256 of all files",
    "load, same layout": "",
    "convert": "to DeepSpeed's universal form, once",
    "load, converted": "into any layout",
    "reshape.py": "for tensor 2 x pipeline 2",
}


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    parser = benchmark_parser(__doc__, rounds=3)
    parser.add_argument(
        "--folder", type=local_path, default=Path(), help="where to write (default: the current folder)"
    )
    args, words = parser.parse_known_args(argv)
    settings = Settings(parse_command_line(words), steps=1, rounds=args.rounds, vocab_size=args.vocab_size)
    require_one_rank(load_config(settings.command.files, settings.command.overrides))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    # DeepSpeed, which this imports, asks which accelerator was prepared.
    from tools.benchmarks.checkpoint_process import measure

    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.folder) as folder:
        report = measure(settings, Path(folder).resolve())
    print(table(report))
    write_report(report, args.output)
    return 0


def table(report: dict[str, Any]) -> str:
    """Formats the report as a table: medians, and the range over the rounds."""
    rounds = len(report["seconds"]["step"])
    lines = [
        f"{' '.join(report['config'])}: {format_count(report['parameters'])} parameters, {report['dtype']}, "
        f"{report['device']}, torch {report['torch']}; median of {rounds} rounds",
        "",
        f"{'':38}{'seconds':>9}{'fastest':>9}{'slowest':>9}",
    ]
    for name, meaning in MEANINGS.items():
        seconds = report["seconds"][name]
        figures = "".join(f"{value:>9.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds)))
        lines.append(f"{name:38}{figures}  {meaning}")
    pairs = zip(report["seconds"]["step"], report["seconds"]["step while a save is written"], strict=True)
    kept = [alone / beside for alone, beside in pairs]
    lines += [
        "",
        f"beside a save, steps keep {statistics.median(kept):.0%} of their speed ({min(kept):.0%} to {max(kept):.0%})",
        "",
        f"{'':38}{'GiB':>9}{'bytes per parameter':>22}",
    ]
    for name, size in report["bytes"].items():
        lines.append(f"{name:38}{size / 2**30:>9.2f}{size / report['parameters']:>22.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
