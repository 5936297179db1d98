"""Grows the model of a run that goes on: at one of its steps, or at its start from a smaller checkpoint.

The small model's checkpoint is on disk by then. The larger one's takes its place in `save`, and the run goes on from
that as from any other, so that a run which is killed at any moment finds one of the two. The small one's stays in
<save>/before_growth.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.keep_copy import keep_copy
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, os_errors_as
from megatron.growth.grow_checkpoint import grow_checkpoint
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
    began = time.monotonic()
    with os_errors_as(CheckpointError, "the checkpoint folder"):
        if source.path.resolve().parent == save:
            on_first_rank(partial(keep_copy, source.path, save / BEFORE_GROWTH))
        sizes = ParallelSizes(context.tensor_size, context.pipe_size, context.data_size)
        larger = config.model_copy(update={"model": due.after})
        report = PeriodicReport(logger.info, seconds=30.0)
        on_first_rank_meanwhile(
            partial(grow_checkpoint, source, larger, due.rules, sizes, save, has_lease=True),
            waiting=lambda: report("growing for %.0f s so far", time.monotonic() - began),
        )
    logger.info("grown in %.1f s", time.monotonic() - began)
    found = find_checkpoint(save, source.state.iteration, config.checkpoint.verify_checkpoint)
    if found is None:
        raise CheckpointError(f"{save}: the checkpoint of the larger model is gone.")
    return go_on_from(found, config.checkpoint, found.manifest.run_id)
