"""The command that measures on a GPU: its plan can be run, and its rows are written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.config.command_line import parse_command_line
from megatron.config.load_config import load_config
from tests.helpers.commands import run_command
from tools.benchmarks.gpu_measurements import Measurement, measurements
from tools.benchmarks.gpu_truth import measure_all

COMMAND = "tools/benchmarks/gpu_truth.py"
ABOUT = {
    "device": "NVIDIA H200",
    "devices": 1,
    "memory_gib": 139.8,
    "cuda": "13.0",
    "versions": {"torch": "2.13.0", "triton": None},
    "commit": "abc",
    "date": "2026-11-21T20:00:00+00:00",
}


def test_the_plan_needs_no_gpu() -> None:
    finished = run_command([COMMAND, "--plan"])
    assert finished.returncode == 0
    assert finished.stdout.startswith("1. kernels are right: ")
    assert "train 150M, all speed-ups: 45 % MFU or more" in finished.stdout


def test_without_a_gpu_it_says_how_to_see_the_plan() -> None:
    finished = run_command([COMMAND])
    assert finished.returncode == 1
    assert (
        "torch sees no GPU, so nothing was measured. `python tools/benchmarks/gpu_truth.py --plan`" in finished.stderr
    )


@pytest.mark.parametrize("row", list(measurements()), ids=lambda row: row.name)
def test_every_command_names_what_exists(row: Measurement) -> None:
    """Tools, test folders and configurations, whose overrides are valid."""
    if row.arguments[0] == "-m":
        assert Path(row.arguments[-1]).is_dir()
        return
    tool, *words = row.arguments
    assert Path(tool).is_file()
    command = parse_command_line(words[: words.index("--vocab-size")])
    loaded = load_config(command.files, command.overrides)
    assert loaded.run.training.precision.dtype == "bf16"


def test_rows_are_written_as_they_come_until_the_time_is_up(tmp_path: Path) -> None:
    write = "import json, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(json.dumps({'rate': 7}))"
    seen: list[str] = []

    def rows() -> Iterator[Measurement]:
        yield Measurement("good", "One.", ("-c", write, "{report}"), 1, lambda report: {"rate": report["rate"]})
        seen.append(next(tmp_path.glob("*.md")).read_text())
        yield Measurement("bad", "Two.", ("-c", "raise SystemExit(3)"), 1)
        yield Measurement("slow", "Three.", ("-c", "import time; time.sleep(60)"), 0.02)
        yield Measurement("late", "Four.", ("-c", ""), 1)

    page = measure_all(rows(), 60, ABOUT, tmp_path)
    assert "| good | ok | rate 7 | One. |" in seen[0]
    assert "| bad |" not in seen[0]
    assert page.name == "NVIDIA-H200-2026-11-21T20-00.md"
    results = json.loads(page.with_suffix(".json").read_text())
    outcomes = [row["result"] for row in results["rows"]]
    assert outcomes[:2] == ["ok", f"failed with exit code 3: see {page.stem}.log"]
    assert outcomes[2:] == ["ended after 0.0 minutes", "ok"]
    assert results["rows"][0]["report"] == {"rate": 7}
    assert "1 x NVIDIA H200 of 139.8 GiB, CUDA 13.0, torch 2.13.0, commit abc." in page.read_text()


def test_what_no_time_is_left_for_is_listed(tmp_path: Path) -> None:
    page = measure_all([Measurement("late", "Four.", ("-c", ""), 1)], 0, ABOUT, tmp_path)
    assert "| late | not run: no time left |  | Four. |" in page.read_text()
