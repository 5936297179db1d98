"""The benchmark of preprocessing runs as a command, and both pipelines write the same bytes."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import run_command

COMMAND = "tools/benchmarks/benchmark_preprocessing.py"


@pytest.mark.full
def test_table_and_file(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    finished = run_command([COMMAND, "--megabytes", "1", "--vocab-size", "400", "--output", str(output)])
    assert finished.returncode == 0, finished.stderr
    report = json.loads(output.read_text())
    assert len(report["runs"]) == 7 and report["text_bytes"] >= 1_000_000
    assert all(run["seconds"] > 0 and run["peak_mb"] > 10 for run in report["runs"])
    for word in ("plain", "auto", "times plain", "of ceiling", "whole text over a quarter"):
        assert word in finished.stdout
