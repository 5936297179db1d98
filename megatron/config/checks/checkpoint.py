"""Checks of the section `checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig

_MOST_CHECKPOINTS = 10**6


_SMALLEST_RATIO = 1.0001


def _checkpoint_steps(run: RunConfig) -> Iterator[Finding]:
    factor, scale = run.checkpoint.checkpoint_factor, run.checkpoint.checkpoint_scale
    if factor is None:
        return
    if scale == "linear" and not float(factor).is_integer():
        yield Finding("checkpoint.checkpoint_factor", "expected a whole number of steps, or checkpoint_scale: log")
    elif scale == "linear" and run.training.train_iters / factor > _MOST_CHECKPOINTS:
        yield Finding(
            "checkpoint.checkpoint_factor",
            f"asks for more than {_MOST_CHECKPOINTS:,} checkpoints in train_iters {run.training.train_iters}",
        )
    if scale == "log" and factor < _SMALLEST_RATIO:
        yield Finding(
            "checkpoint.checkpoint_factor",
            f"expected a ratio above 1, of at least {_SMALLEST_RATIO}, with checkpoint_scale: log",
        )


def _checkpoint_to_load(run: RunConfig) -> Iterator[Finding]:
    checkpoint = run.checkpoint
    if checkpoint.load is None:
        if checkpoint.iteration is not None:
            yield Finding("checkpoint.iteration", "needs load: the folder of a checkpoint")
        if checkpoint.finetune:
            yield Finding("checkpoint.finetune", "needs load: the folder of a checkpoint")
    if checkpoint.auto_resume and checkpoint.save is None:
        yield Finding("checkpoint.auto_resume", "needs save: the folder that the run goes on from")
    if checkpoint.save_remote is not None and checkpoint.save is None:
        yield Finding("checkpoint.save_remote", "needs save: the folder from which checkpoints are uploaded")
    if checkpoint.auto_resume and checkpoint.iteration is not None and checkpoint.load == checkpoint.save:
        yield Finding(
            "checkpoint.iteration", "contradicts auto_resume: true, which goes on from the newest checkpoint; keep one"
        )


CHECKS: tuple[Check, ...] = (
    _checkpoint_steps,
    _checkpoint_to_load,
)
