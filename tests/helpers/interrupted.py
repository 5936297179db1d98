"""Runs of two ranks that are interrupted, and the comparison of their ends with a run that nobody touched."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tests.helpers.configs import TOKENFORMER
from tests.helpers.records import records
from tests.helpers.runs import Finished, run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint

# Saves at 2, 4 and 6; the one of step 4 is interrupted, with an older checkpoint to go back to, and to delete.
BASE: dict[str, Any] = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 6,
    "checkpoint_factor": 2,
    "keep_last_n_checkpoints": 1,
    "eval_interval": 3,
    "auto_resume": True,
}
SAVE = 4
KILLED = [-signal.SIGKILL] * 2


def write(folder: Path, dataset: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = folder / "run.yml"
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config.write_text(json.dumps(BASE | paths | changes))
    return config


def assert_ends_like(untouched: Path, config: Path) -> Finished:
    """Start again, and compare the end."""
    finished = run_ranks(config, ranks=2)
    assert finished.codes == [0, 0], finished.output
    run = config.with_suffix("")
    assert {path.name for path in run.iterdir()} == {path.name for path in untouched.iterdir()}
    assert_same_checkpoint(run / "global_step6", untouched / "global_step6")
    for key in ("train/lm_loss", "valid/lm_loss", "test/lm_loss"):
        assert records(run, key) == records(untouched, key)
    return finished


TWO_RANKS: dict[str, Any] = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 12,
    "eval_interval": 4,
    "eval_iters": 3,
    "auto_resume": True,
}


def saved(run: Path) -> list[str]:
    assert not list(run.glob(".*")), "nothing half-written is left"
    return sorted(path.name for path in run.glob("global_step*"))
