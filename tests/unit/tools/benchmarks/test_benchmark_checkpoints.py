"""The benchmark of checkpoints refuses several ranks."""

from pathlib import Path

import yaml

from tests.helpers.commands import run_command
from tests.helpers.configs import BENCHMARKED

COMMAND = "tools/benchmarks/benchmark_checkpoints.py"


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump(BENCHMARKED))
    finished = run_command([COMMAND, str(config), "model_parallel_size=2", "--vocab-size", "100"])
    assert finished.returncode == 2
    assert "model_parallel_size=1" in finished.stderr
