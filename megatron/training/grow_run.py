"""Changes the model of a run that goes on: it grows, at a step or at the start, or is made of a reference's layers.

A growing run has the small model's checkpoint on disk by then. The larger one's takes its place in `save`, and the run
goes on from that as from any other, so that a run which is killed at any moment finds one of the two. The small one's
stays in <save>/before_growth. A model that inherits is written to `save` in the same way; until it is there, the run
starts from the reference again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.keep_copy import keep_copy
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, os_errors_as
from megatron.growth.grow_checkpoint import grow_checkpoint
from megatron.growth.inheriting.inherit_checkpoint import Reference, inherit_checkpoint, require_tokenizer_of
from megatron.io.progress import PeriodicReport
from megatron.mpu.agreement import on_first_rank, on_first_rank_meanwhile
from megatron.mpu.context import ParallelContext
from megatron.training.run_start import RunStart, go_on_from

logger = logging.getLogger(__name__)

BEFORE_GROWTH = "before_growth"
"""Folder in `save` of the small models' last checkpoints."""


def grow_start(config: RunConfig, start: RunStart, context: ParallelContext) -> RunStart:
    """Grows the checkpoint of a start whose growth is due; returns the start from the larger one. Collective.

    Rank 0 does the work, a layer at a time; the others wait. Raises ConfigError and CheckpointError as
    `grow_checkpoint` does, on all ranks.
    """
    source, due = start.checkpoint, start.due
    if source is None or due is None or config.checkpoint.save is None:
        raise ValueError("a run grows from a checkpoint, by a growth that is due, and into the folder `save`")
    save = Path(config.checkpoint.save).resolve()
    logger.info("%s: growing by %s: %s", source.path, due.rules.operator, due.record.before.change_to(due.record.after))
    if source.path.resolve().parent == save:
        with os_errors_as(CheckpointError, "the checkpoint folder"):
            on_first_rank(partial(keep_copy, source.path, save / BEFORE_GROWTH))
    larger = config.model_copy(update={"model": due.after})
    return _start_from_written(
        partial(grow_checkpoint, source, larger, due.rules, _sizes(context), save, has_lease=True),
        config,
        save,
        "growing",
    )


def inherit_start(config: RunConfig, start: RunStart, context: ParallelContext) -> RunStart:
    """Makes the model of a start of a reference's layers, moments included; returns the start from it. Collective.

    As `grow_start` does it. Raises ConfigError and CheckpointError as `inherit_checkpoint` does, on all ranks.
    """
    source, inherits = start.checkpoint, start.inherits
    if source is None or inherits is None or config.checkpoint.save is None:
        raise ValueError("a run inherits from a checkpoint, and into the folder `save`")
    logger.info("%s", start)
    save = Path(config.checkpoint.save).resolve()
    require_tokenizer_of(Reference.of(source, optimizer=False), config)

    def write() -> Path:
        reference = Reference.of(source)
        return inherit_checkpoint(reference, config, inherits.rules, _sizes(context), save, has_lease=True)

    return _start_from_written(write, config, save, "inheriting")


def _sizes(context: ParallelContext) -> ParallelSizes:
    return ParallelSizes(context.tensor_size, context.pipe_size, context.data_size)


def _start_from_written(write: Callable[[], Path], config: RunConfig, save: Path, doing: str) -> RunStart:
    """Writes a checkpoint on the first rank; returns the start from it. Collective."""
    began = time.monotonic()
    report = PeriodicReport(logger.info, seconds=30.0)
    with os_errors_as(CheckpointError, "the checkpoint folder"):
        written = on_first_rank_meanwhile(
            write, waiting=lambda: report("%s for %.0f s so far", doing, time.monotonic() - began)
        )
    logger.info("%s took %.1f s", doing, time.monotonic() - began)
    found = find_checkpoint(written, None, config.checkpoint.verify_checkpoint)
    if found is None:
        raise CheckpointError(f"{save}: the checkpoint that this run has written is gone.")
    return go_on_from(found, config.checkpoint, found.manifest.run_id)
