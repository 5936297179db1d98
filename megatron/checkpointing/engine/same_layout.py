"""Comparison of the layout that wrote a checkpoint with a run's: DeepSpeed can load its files only when they agree."""

from __future__ import annotations

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.mpu.context import ParallelContext


def layout_differences(
    checkpoint: Checkpoint, config: RunConfig, context: ParallelContext, padded_vocab_size: int
) -> list[str]:
    """Lists the differences between the layout that wrote a checkpoint and a run's, one sentence each."""
    state, theirs = checkpoint.state, checkpoint.config
    pairs: dict[str, tuple[object, object]] = {
        "tensor-parallel size": (state.tensor_parallel_size, context.tensor_size),
        "pipeline-parallel size": (state.pipe_parallel_size, context.pipe_size),
        "data-parallel size": (state.data_parallel_size, context.data_size),
        "padded vocabulary": (state.padded_vocab_size, padded_vocab_size),
        "precision": (theirs.training.precision.dtype, config.training.precision.dtype),
    }
    if context.pipe_size > 1:
        methods = (theirs.parallel.pipe_partition_method, config.parallel.pipe_partition_method)
        pairs["pipe_partition_method"] = methods
    return [f"{name} {before}, here {now}" for name, (before, now) in pairs.items() if before != now]
