"""The benchmark of checkpoints runs as a command, and measures what it says."""

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import run_command
from tests.helpers.configs import BENCHMARKED
from tools.benchmarks.benchmark_checkpoints import MEANINGS

COMMAND = "tools/benchmarks/benchmark_checkpoints.py"


@pytest.mark.full
def test_table_and_file(tmp_path: Path) -> None:
    config, output = tmp_path / "tiny.yml", tmp_path / "report.json"
    config.write_text(yaml.safe_dump(BENCHMARKED))
    options = ["--vocab-size", "100", "--rounds", "2", "--folder", str(tmp_path), "--output", str(output)]
    finished = run_command([COMMAND, str(config), "hidden_size=256", *options])
    assert finished.returncode == 0, finished.stderr
    report = json.loads(output.read_text())
    assert report["seconds"].keys() == MEANINGS.keys()
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in report["seconds"].values())
    # Weights and the optimizer's copy of them, and two moments; the rest is names.
    assert report["bytes"]["checkpoint"] / report["parameters"] == pytest.approx(16, rel=0.1)
    assert report["bytes"]["universal form"] / report["parameters"] == pytest.approx(12, rel=0.3)
    assert sorted(tmp_path.iterdir()) == [output, config]
    for name in (*MEANINGS, "bytes per parameter"):
        assert name in finished.stdout
