"""Measures on a GPU, most important first, what is only calculated without one, and writes each row as it comes.

    python tools/benchmarks/gpu_truth.py --minutes 60
    python tools/benchmarks/gpu_truth.py --plan

Tests the kernels as the GPU compiles them, trains 150M and 1.5B with and without each speed-up beside a loop in plain
torch, and times kernels against torch.compile and their limits. Needs no dataset, no tokenizer and no network. Writes
GPU_DATE.md, .json and .log to tools/benchmarks/results/, or to --output. What still runs when the time is up is ended,
and what was not run is listed. --plan prints the commands and what each decides, and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.checkout import CHECKOUT
from tools.benchmarks.gpu_measurements import Measurement, measurements
from tools.command_line import positive, tool_parser

RESULTS = Path(__file__).parent / "results"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options."""
    parser = tool_parser(__doc__)
    parser.add_argument("--minutes", type=positive, default=60, help="time for all of it (default: 60)")
    parser.add_argument("--plan", action="store_true", help="print what would be measured, and end")
    parser.add_argument("--output", type=local_path, default=RESULTS, help="folder of the results")
    return parser.parse_args(argv)


def plan(rows: Iterable[Measurement]) -> str:
    """Formats the commands in their order, with what each decides."""
    lines = []
    for number, row in enumerate(rows, 1):
        command = " ".join(word if " " not in word else f"'{word}'" for word in row.arguments)
        lines += [f"{number}. {row.name}: {row.decides} (at most {row.minutes:g} minutes)", f"   python {command}"]
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """Describes GPU, software and commit. Raises EnvironmentSetupError where torch sees no GPU."""
    import torch

    from megatron.monitor.provenance import device_name, git_commit

    if not torch.cuda.is_available():
        raise EnvironmentSetupError(
            "gpu_truth.py: torch sees no GPU, so nothing was measured. `python tools/benchmarks/gpu_truth.py --plan` "
            "prints what it measures, and what each figure decides; start it where a GPU is."
        )
    return {
        "device": device_name(),
        "devices": torch.cuda.device_count(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "versions": {package: _version(package) for package in ("torch", "triton", "deepspeed")},
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(row: Measurement, seconds: float, log: Path) -> dict[str, Any]:
    """Runs one measurement for at most `seconds`; its output goes to the end of `log`. Returns its row."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as output:
        report = Path(folder) / "report.json"
        words = [word.replace("{report}", str(report)) for word in row.arguments]
        output.write(f"\n== {row.name}: python {' '.join(words)}\n")
        output.flush()
        try:
            done = subprocess.run(
                [sys.executable, *words],
                cwd=CHECKOUT,
                env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            result = "ok" if done.returncode == 0 else f"failed with exit code {done.returncode}: see {log.name}"
        except subprocess.TimeoutExpired:
            result = f"ended after {seconds / 60:.1f} minutes"
        found = json.loads(report.read_text()) if result == "ok" and row.figures is not None else None
    figures = row.figures(found) if row.figures is not None and found is not None else {}
    return {
        "name": row.name,
        "decides": row.decides,
        "command": ["python", *row.arguments],
        "result": result,
        "seconds": round(time.monotonic() - started, 1),
        "figures": figures,
        "report": found,
    }


def markdown(results: dict[str, Any]) -> str:
    """Formats the results as a table in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    lines = [
        f"# {results['device']}, {results['date']}",
        "",
        f"{results['devices']} x {results['device']} of {results['memory_gib']} GiB, CUDA {results['cuda']}, "
        f"{versions}, commit {results['commit']}. One of them trains. MFU counts causal FLOPs, without recomputation.",
        "",
        "| what | result | figures | decides |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        figures = "; ".join(f"{name} {value}" for name, value in row["figures"].items())
        lines.append(f"| {row['name']} | {row['result']} | {figures} | {row['decides']} |")
    return "\n".join(lines) + "\n"


def measure_all(rows: Iterable[Measurement], minutes: float, about: dict[str, Any], folder: Path) -> Path:
    """Measures rows in their order until the time is up, and writes both files after each. Returns the Markdown."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{about['device']}_{about['date'][:16]}").strip("-")
    deadline = time.monotonic() + 60 * minutes
    results = about | {"minutes": minutes, "rows": []}
    page = folder / f"{stem}.md"
    with os_errors_as(EnvironmentSetupError, str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            left = deadline - time.monotonic()
            if left > 0:
                found = measure(row, min(left, 60 * row.minutes), page.with_suffix(".log"))
            else:
                found = {"name": row.name, "decides": row.decides, "result": "not run: no time left", "figures": {}}
            results["rows"].append(found)
            page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
            page.write_text(markdown(results))
            print(f"{found['name']}: {found['result']} {found['figures'] or ''}", flush=True)
    return page


def main(argv: Sequence[str]) -> int:
    """Prints the plan, or measures; returns 1 where a measurement failed."""
    args = parse_args(argv)
    if args.plan:
        print(plan(measurements()))
        return 0
    page = measure_all(measurements(), args.minutes, hardware(), args.output)
    print(page)
    rows = json.loads(page.with_suffix(".json").read_text())["rows"]
    return int(any(row["result"].startswith("failed") for row in rows))


if __name__ == "__main__":
    run_tool(main)
