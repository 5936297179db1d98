"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron.config.sections.training import BatchConfig, TrainingConfig
from megatron.mpu.context import ParallelContext
from megatron.mpu.random import seed_dropout
from megatron.training.stability.non_finite import must_roll_back
from megatron.training.stability.step_guard import StepGuard
from megatron.training.step import Callback, Progress, Step

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


class Ending(Enum):
    """Why the loop has ended."""

    FINISHED = "all steps are taken"
    STOPPED = "a signal or a limit has ended the run, and what it did is saved"
    ROLL_BACK = "the run is to go on from its last checkpoint"


def train(
    engine: PipelineEngine,
    batches: Iterator[Any],
    progress: Progress,
    training: TrainingConfig,
    batch: BatchConfig,
    guard: StepGuard,
    context: ParallelContext,
    callbacks: Sequence[Callback],
) -> Ending:
    """Take optimizer steps until train_iters, calling every callback after each; `progress` is kept up to date.

    A request to stop takes effect after a step, so that every start makes progress. Raises NonFiniteError for a step
    that is not finite, as far as the policy says so.
    """
    stop = guard.stop
    for callback in callbacks:
        callback.before_training()
    while progress.iteration < training.train_iters:
        seed_dropout(training.seed, progress.iteration, context)
        learning_rate = engine.lr_scheduler.get_last_lr()[0]
        loss = engine.train_batch(batches)
        progress.iteration += 1
        progress.consumed_train_samples += batch.global_batch_size
        if must_roll_back(guard, progress, training.non_finite, batch):
            return Ending.ROLL_BACK
        is_last = progress.iteration == training.train_iters
        step = Step(
            progress.iteration,
            loss.detach().float(),
            learning_rate,
            is_last=is_last,
            ends_run=is_last or _exits_at(progress.iteration, training.exit_interval),
            left_out=guard.step_was_left_out,
        )
        for callback in callbacks:
            callback.after_step(step)
        if (step.ends_run or stop.agreed) and not is_last:
            return Ending.STOPPED
    return Ending.FINISHED


def _exits_at(iteration: int, exit_interval: int | None) -> bool:
    return exit_interval is not None and iteration % exit_interval == 0
