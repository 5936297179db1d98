"""Disk that a run's checkpoints take over its whole schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.save_schedule import is_kept_for_ever, save_iterations
from megatron.config.sections.run_config import RunConfig

STATE_BYTES = 64 * 1024
"""State, configuration and manifest of a checkpoint, roughly [bytes]."""


@dataclass(frozen=True)
class CheckpointDisk:
    """Disk for checkpoints."""

    each: float
    """Size of one checkpoint [bytes]."""
    saves: int
    """Checkpoints that the schedule writes."""
    kept: int
    """Checkpoints that are there at the end."""
    most: int
    """Most that are there at a time, the one that is being written included; one before it is deleted."""
    is_saved: bool
    """Whether the run has a folder to save in."""

    @property
    def peak(self) -> float:
        """Returns the most disk that is needed at a time [bytes]."""
        return self.most * self.each

    @property
    def written(self) -> float:
        """Returns what the whole run writes [bytes]."""
        return self.saves * self.each


def checkpoint_disk(run: RunConfig, bytes_of_files: float) -> CheckpointDisk:
    """Counts the checkpoints of a run's schedule, each of so many bytes."""
    steps = sorted(save_iterations(run.checkpoint, run.training.train_iters))
    for_ever = [step for step in steps if is_kept_for_ever(step, run.checkpoint)]
    newest = run.checkpoint.keep_last_n_checkpoints
    kept = len(steps) if newest is None else len(set(for_ever) | set(steps[-newest:]))
    most = kept if newest is None else min(kept + 1, len(steps))
    return CheckpointDisk(
        bytes_of_files + STATE_BYTES, len(steps), kept, most, is_saved=run.checkpoint.save is not None
    )
