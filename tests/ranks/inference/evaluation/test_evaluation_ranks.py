"""The same results on every layout of ranks, as users start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from tests.helpers.eval_results import read_record
from tests.helpers.eval_tasks import TASKS
from tests.helpers.runs import run_ranks
from tests.helpers.tiny_checkpoints import make_checkpoint

LAYOUTS = [
    pytest.param(1, 1, id="one-rank"),
    pytest.param(2, 2, id="tensor-2"),
    pytest.param(2, 1, id="data-2"),
    pytest.param(4, 2, id="tensor-2-data-2", marks=pytest.mark.full),
    pytest.param(3, 1, id="data-3", marks=pytest.mark.full),
]


@pytest.fixture(scope="module")
def reference(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, tmp_path_factory: pytest.TempPathFactory
):
    """Results of one rank that scores one sequence at a time."""
    return _results(eval_config, eval_tasks, tmp_path_factory.mktemp("reference"), 1, "--eval_batch_size", "1")


def _results(config: Path, tasks: Path, folder: Path, ranks: int, *more: str) -> dict[str, Any]:
    flags = ["--include_path", str(tasks), "--eval_tasks", *TASKS, "--output", str(folder / "results.json")]
    finished = run_ranks(config, *flags, *more, ranks=ranks, script="eval", output=folder)
    assert finished.code == 0, finished.output
    return read_record(folder / "results.json")


@pytest.mark.parametrize(("ranks", "tensor"), LAYOUTS)
def test_layouts_make_no_difference(
    ranks: int, tensor: int, reference: dict[str, Any], eval_config: Path, eval_tasks: Path, tmp_path: Path
) -> None:
    found = _results(eval_config, eval_tasks, tmp_path, ranks, f"model_parallel_size={tensor}", "pipe_parallel_size=2")
    assert found["record"]["config"]["ranks"] == {"tensor": tensor, "data": ranks // tensor}
    assert found["metrics"].keys() == reference["metrics"].keys()
    for name, (value, error) in reference["metrics"].items():
        assert found["metrics"][name][0] == pytest.approx(value, rel=1e-4), name
        assert found["metrics"][name][1] == (None if error is None else pytest.approx(error, rel=1e-4)), name


@pytest.mark.parametrize(("tensor", "pipe"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.full)])
def test_checkpoints_of_any_layout(
    tensor: int, pipe: int, reference: dict[str, Any], eval_config: Path, eval_tasks: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yml"
    config.write_text(eval_config.read_text().replace(str(eval_config.parent / "run"), str(tmp_path / "run")))
    make_checkpoint(config, tensor=tensor, pipe=pipe)
    found = _results(config, eval_tasks, tmp_path, 2)
    assert found["metrics"] == {
        name: (pytest.approx(value, rel=1e-4), error if error is None else pytest.approx(error, rel=1e-4))
        for name, (value, error) in reference["metrics"].items()
    }


def test_an_error_ends_all_ranks_alike(eval_config: Path, eval_checkpoint: Checkpoint, tmp_path: Path) -> None:
    flags = ["--include_path", str(tmp_path / "none"), "--eval_tasks", "zen_choice"]
    finished = run_ranks(eval_config, *flags, ranks=2, script="eval", output=tmp_path)
    assert finished.code == 2
    assert "is not a folder with task YAMLs" in finished.output
    assert "Traceback" not in finished.output
