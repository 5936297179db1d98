"""Times training steps of data-parallel ranks by two versions of the code, in turns.

    python tools/benchmarks/benchmark_commits.py main configs/tokenformer/150M.yml precision=fp32 \\
        train_micro_batch_size_per_gpu=1 seq_length=128 --vocab-size 50277 --ranks 2

Before is a commit, after the working tree. Each has its ranks on this machine, on its GPUs or over gloo on CPUs, which
live from the first round to the last and wait while the other side's steps are timed. Tokens are random: no dataset is
needed, and with --vocab-size no tokenizer. What both have computed must agree: the tool ends with 1 when losses differ
by more than 1e-5.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from tools.benchmarks.benchmark_command import benchmark_parser, write_report
from tools.command_line import positive
from tools.compare_commits import ROOT, Code, checkout

PROCESS = Path(__file__).with_name("commit_process.py")
START = "import json, runpy, sys; runpy.run_path(sys.argv[1])['main'](**json.loads(sys.argv[2]))"
"""Runs that file's `main` with the modules of whichever checkout is on the path."""
LARGEST_DIFFERENCE = 1e-5


class Side:
    """The ranks of one version."""

    def __init__(self, code: Code, words: Sequence[str], vocab_size: int | None, ranks: int, folder: Path) -> None:
        path = os.pathsep.join([str(code.folder), str(code.folder / "tools" / "start")])
        arguments = json.dumps({"words": list(words), "vocab_size": vocab_size, "store": str(folder / "store")})
        folder.mkdir()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(PROCESS), arguments],
                env=os.environ
                | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},  # they meet in a file
                cwd=code.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def run(self, steps: int) -> dict[str, Any]:
        """Takes steps; returns the seconds of the slowest rank, and losses. Raises RuntimeError for ranks that end."""
        for rank in self.ranks:
            if rank.stdin is not None:
                rank.stdin.write(f"{steps}\n")
                rank.stdin.flush()
        found: list[dict[str, Any]] = [json.loads(_answer(rank)) for rank in self.ranks]
        return found[0] | {"seconds": max(one["seconds"] for one in found)}

    def close(self) -> None:
        """Ends the ranks."""
        for rank in self.ranks:
            rank.kill()
            rank.wait()


def _answer(rank: subprocess.Popen[str]) -> str:
    for line in rank.stdout or ():
        if line.startswith("{"):
            return line
    raise RuntimeError("a rank has ended; what it says is above")


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file; returns the exit code."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("before", help="a commit")
    parser.add_argument("--ranks", type=positive, default=2, help="data-parallel ranks of each side (default: 2)")
    parser.add_argument("--steps", type=positive, default=2, help="steps of a round (default: 2)")
    args, words = parser.parse_known_args(argv)
    words = [str(Path(word).resolve()) if Path(word).is_file() else word for word in words]
    report = measure(args.before, words, args.vocab_size, ranks=args.ranks, steps=args.steps, rounds=args.rounds)
    print(table(report))
    write_report(report, args.output)
    return int(report["difference"] > LARGEST_DIFFERENCE)


def measure(
    before: str, words: Sequence[str], vocab_size: int | None, *, ranks: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Lets both sides take turns. What else the machine does weighs alike on both times of a round."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        codes = {
            "before": stack.enter_context(checkout(before, folder / "before_code")),
            "after": Code("the working tree", ROOT),
        }
        sides = {
            side: stack.enter_context(running(Side(code, words, vocab_size, ranks, folder / side)))
            for side, code in codes.items()
        }
        first = {side: ranks_of.run(1) for side, ranks_of in sides.items()}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        losses: dict[str, list[float]] = {side: list(found["losses"]) for side, found in first.items()}
        for number in range(rounds):
            # Whoever goes first in one round goes last in the next: a steady drift then favours neither.
            for side in list(sides)[:: 1 if number % 2 else -1]:
                found = sides[side].run(steps)
                seconds[side].append(found["seconds"] / steps)
                losses[side] += found["losses"]
        report = {key: first["after"][key] for key in ("parameters", "dtype", "device", "torch")}
        commits = {side: commit_of(code.folder) for side, code in codes.items()}
    differences = (abs(one - other) for one, other in zip(*losses.values(), strict=True))
    return report | {
        "date": datetime.date.today().isoformat(),
        "commits": commits,
        "config": [Path(word).name if Path(word).is_file() else word for word in words],
        "ranks": ranks,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "seconds": seconds,
        "difference": max(differences),
    }


@contextlib.contextmanager
def running(side: Side) -> Iterator[Side]:
    """Ends a side's ranks after the body."""
    try:
        yield side
    finally:
        side.close()


def commit_of(folder: Path) -> str:
    """Returns the commit that a checkout is at."""
    asked = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return asked.stdout.strip()


def table(report: dict[str, Any]) -> str:
    """Formats the report as a Markdown table: seconds of a step, and after over before, round by round."""
    before, after = report["seconds"]["before"], report["seconds"]["after"]
    ratios = sorted(theirs / ours for ours, theirs in zip(before, after, strict=True))
    lines = [
        f"{' '.join(report['config'])}: {report['parameters']:,} parameters, {report['dtype']}, {report['ranks']} "
        f"data-parallel ranks on {report['device']} ({report['cores']} cores, load {report['load']:.0f}), torch "
        f"{report['torch']}, {report['date']}. Losses differ by {report['difference']:.1g} at most.",
        "",
        "| | median | fastest | slowest |",
        "|---|---|---|---|",
    ]
    for name, values in (
        (f"before, {report['commits']['before']} [s per step]", sorted(before)),
        (f"after, {report['commits']['after']} [s per step]", sorted(after)),
        ("after / before, by round", ratios),
    ):
        lines.append(f"| {name} | {values[len(values) // 2]:.3f} | {values[0]:.3f} | {values[-1]:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
