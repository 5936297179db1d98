"""Runs of one rank that several tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.runs import train


def _long_run(base: dict[str, Any], folder: Path, dataset: Path) -> Path:
    """Trains to the end of the schedule with checkpoints of most of the first steps; returns the run's folder."""
    config = folder / "run.yml"
    keys = {
        "train_iters": 30,
        "extra_save_iters": [*range(9), 20],
        "log_batch_hashes": True,
        "data_path": str(dataset),
        "save": str(folder / "run"),
        "index_cache_dir": str(folder),
    }
    config.write_text(yaml.safe_dump(base | keys))
    train(config)
    return folder / "run"


@pytest.fixture(scope="session")
def tokenformer_run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of TOKENFORMER over 30 steps, which all of its shorter runs begin like; tests only read it."""
    return _long_run(TOKENFORMER, tmp_path_factory.mktemp("tokenformer_run"), dataset)


@pytest.fixture(scope="session")
def pythia_run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of PYTHIA over 30 steps, which all of its shorter runs begin like; tests only read it."""
    return _long_run(PYTHIA, tmp_path_factory.mktemp("pythia_run"), dataset)
