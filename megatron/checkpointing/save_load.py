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


def save_checkpoint(engine: PipelineEngine, folder: Path, state: RunState, config: RunConfig) -> Path:
    """Write weights, optimizer state and `state` to `folder`/global_stepN; called by all ranks. Returns the path.

    Everything goes to a temporary folder first, which rank 0 renames when all ranks have written.
    """
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


def require_same_layout(state: RunState, *, tensor: int, pipe: int, data: int) -> None:
    """DeepSpeed loads a checkpoint only in the layout that wrote it. Raises CheckpointError for another one."""
    written = (state.tensor_parallel_size, state.pipe_parallel_size, state.data_parallel_size)
    if written != (tensor, pipe, data):
        raise CheckpointError(
            f"the checkpoint was written with (tensor, pipeline, data) parallel sizes {written}, this run has "
            f"{(tensor, pipe, data)}. Start it with the sizes of the checkpoint."
        )
