"""The benchmark of checkpoints refuses several ranks, and says how much of their speed steps keep beside a save."""

from pathlib import Path

import yaml

from tests.helpers.commands import run_command
from tests.helpers.configs import BENCHMARKED
from tools.benchmarks.benchmark_checkpoints import MEANINGS, table

COMMAND = "tools/benchmarks/benchmark_checkpoints.py"


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump(BENCHMARKED))
    finished = run_command([COMMAND, str(config), "model_parallel_size=2", "--vocab-size", "100"])
    assert finished.returncode == 2
    assert "model_parallel_size=1" in finished.stderr


def test_the_share_of_their_speed_is_taken_round_by_round() -> None:
    seconds = {name: [1.0, 2.0, 4.0] for name in MEANINGS} | {"step while a save is written": [2.0, 2.5, 4.0]}
    report = {
        **{"config": ["a.yml"], "parameters": 10, "dtype": "fp32", "device": "cpu", "torch": "2"},
        **{"seconds": seconds, "bytes": {"checkpoint": 160}},
    }
    assert "beside a save, steps keep 80% of their speed (50% to 100%)" in table(report).splitlines()
