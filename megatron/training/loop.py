"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from megatron.config.training import TrainingConfig
from megatron.mpu.context import ParallelContext
from megatron.mpu.random import seed_dropout
from megatron.training.progress import Callback, Progress, Step

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def train(
    engine: PipelineEngine,
    batches: Iterator[Any],
    progress: Progress,
    training: TrainingConfig,
    global_batch_size: int,
    context: ParallelContext,
    callbacks: Sequence[Callback],
) -> None:
    """Take optimizer steps until train_iters, calling every callback after each; `progress` is kept up to date."""
    for callback in callbacks:
        callback.before_training()
    while progress.iteration < training.train_iters:
        seed_dropout(training.seed, progress.iteration, context)
        learning_rate = engine.lr_scheduler.get_last_lr()[0]
        loss = engine.train_batch(batches)
        progress.iteration += 1
        progress.consumed_train_samples += global_batch_size
        is_last = progress.iteration == training.train_iters
        step = Step(progress.iteration, loss.detach().float(), learning_rate, is_last)
        for callback in callbacks:
            callback.after_step(step)
