"""Runs that are killed while they inherit, and begin as if nothing had happened when they are started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import watch_save
from tests.helpers.interrupted import SAVE
from tests.helpers.interrupted import write as write_interrupted
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint


def write(folder: Path, dataset: Path, reference: Path) -> Path:
    """A run of the reference's first layer that keeps its moments."""
    keys: dict[str, Any] = {"num_layers": 1, "load": str(reference), "inherit": {"moments": "keep"}}
    return write_interrupted(folder, dataset, **keys)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    config = write_interrupted(tmp_path_factory.mktemp("reference"), dataset)
    assert run_ranks(config, f"exit_interval={SAVE}").code == 75
    return config.with_suffix("")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, dataset: Path, reference: Path) -> Path:
    """A run that inherits, and beside it `events`: what it does to its folder until it has."""
    folder = tmp_path_factory.mktemp("inherits")
    train(write(folder, dataset, reference), before=watch_save, arguments=(0, folder / "events", None))
    return folder / "run"


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_killed_before_things_that_inheriting_does(
    untouched: Path, reference: Path, dataset: Path, tmp_path: Path
) -> None:
    """Its cover in every run of the tests is the loop that is killed (ranks/tools/test_inheriting_loop.py)."""
    events = (untouched.parent / "events").read_text().splitlines()
    (publication,) = [number for number, line in enumerate(events) if "os.rename ./latest.tmp" in line]
    for number in range(1, publication + 2):
        config = write(tmp_path / str(number), dataset, reference)
        killed = run_ranks(config, before=watch_save, arguments=(0, None, number))
        assert killed.code == -9, (events[number], killed.output)
        train(config)
        assert_same_checkpoint(config.with_suffix("") / "global_step6", untouched / "global_step6")
