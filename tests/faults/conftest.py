"""Runs that nobody touches, for runs that are interrupted to end like."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.faults import watch_save
from tests.helpers.interrupted import SAVE, write
from tests.helpers.runs import train


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run on two ranks, and beside it `events`: what rank 0 does to its folder during one save."""
    folder = tmp_path_factory.mktemp("untouched")
    config = write(folder, dataset)
    train(config, ranks=2, before=watch_save, arguments=(SAVE, folder / "events", None))
    return folder / "run"


@pytest.fixture(scope="session")
def saved_each_step(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Callable[[int], tuple[Path, float]]:
    """Trains a run that saves each of so many steps, once; returns it and the seconds that it took per step."""
    done: dict[int, tuple[Path, float]] = {}

    def run(steps: int) -> tuple[Path, float]:
        if steps not in done:
            changes = {"train_iters": steps, "checkpoint_factor": 1, "keep_last_n_checkpoints": 2}
            config = write(tmp_path_factory.mktemp("saved_each_step"), dataset, **changes)
            begin = time.monotonic()
            train(config, ranks=2, timeout=1200.0)
            done[steps] = config.with_suffix(""), (time.monotonic() - begin) / steps
        return done[steps]

    return run
