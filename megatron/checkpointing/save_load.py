"""Saves and loads a run through DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import distributed

from megatron.checkpointing.folder import Checkpoint, RunState, checkpoint_name, publish, remove_old, write_state
from megatron.checkpointing.safe_files import check_folder
from megatron.config.run import RunConfig
from megatron.errors import CheckpointError

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def save_checkpoint(engine: PipelineEngine, state: RunState, config: RunConfig) -> Path:
    """Write weights, optimizer state and `state` to global_stepN in the configured folder `save`; returns its path.

    Called by all ranks. Everything goes to a temporary folder first, which rank 0 renames when all have written.
    Raises CheckpointError when `save` is not configured.
    """
    if config.checkpoint.save is None:
        raise CheckpointError("save: no folder is configured to save checkpoints in.")
    folder = Path(config.checkpoint.save)
    final = folder / checkpoint_name(state.iteration)
    temporary = folder / f".{final.name}.tmp"
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    if distributed.get_rank() == 0:
        write_state(temporary, state, config)
        publish(temporary, final)
        if config.checkpoint.keep_last_n_checkpoints is not None:
            remove_old(folder, config.checkpoint.keep_last_n_checkpoints)
    distributed.barrier()
    return final


def load_checkpoint(engine: PipelineEngine, checkpoint: Checkpoint, *, optimizer: bool, lr_schedule: bool) -> None:
    """Load the weights, and with them the optimizer state and the place in the schedule where asked for.

    Raises CheckpointError when a file is damaged or unsafe, or DeepSpeed does not find what it needs.
    """
    check_folder(checkpoint.path)
    loaded, _ = engine.load_checkpoint(
        str(checkpoint.path.parent),
        tag=checkpoint.path.name,
        load_optimizer_states=optimizer,
        load_lr_scheduler_states=lr_schedule,
    )
    if loaded is None:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed found nothing to load in it. Its files are incomplete.")
