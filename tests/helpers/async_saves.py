"""Runs whose saves are written while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.faults import slow_writes
from tests.helpers.interrupted import write as write_interrupted
from tests.helpers.records import records
from tests.helpers.tensor_files import assert_same_checkpoint

CHANGES: dict[str, Any] = {"async_save": True, "keep_last_n_checkpoints": None}
SLOW = 0.02
"""Seconds before each of the ten files: a save takes longer than a step."""


def write(folder: Path, dataset: Path, **changes: Any) -> Path:
    """A run of six steps that saves every second one."""
    return write_interrupted(folder, dataset, **(CHANGES | changes))


def assert_same_run(ours: Path, theirs: Path, steps: int = 6) -> None:
    """Compares the files, the last checkpoint and the losses; one may have saved its initial weights as well."""
    ours_alone = {path.name for path in ours.iterdir()} ^ {path.name for path in theirs.iterdir()}
    assert ours_alone <= {"global_step0"}
    assert_same_checkpoint(ours / f"global_step{steps}", theirs / f"global_step{steps}")
    for key in ("train/lm_loss", "valid/lm_loss", "test/lm_loss"):
        assert records(ours, key) == records(theirs, key)


def slow(*fault: Any) -> None:
    """Slow writes, and a fault with its arguments."""
    slow_writes(SLOW)
    if fault:
        function, *arguments = fault
        function(*arguments)
