"""The training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron.training.progress import Callback, Progress, Step

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def train(
    engine: PipelineEngine,
    batches: Iterator[Any],
    progress: Progress,
    *,
    train_iters: int,
    global_batch_size: int,
    seed: int,
    data_rank: int,
    callbacks: Sequence[Callback],
) -> None:
    """Take optimizer steps until `train_iters`, calling every callback after each; `progress` is kept up to date."""
    for callback in callbacks:
        callback.before_training()
    while progress.iteration < train_iters:
        seed_dropout(seed, progress.iteration, data_rank)
        learning_rate = engine.lr_scheduler.get_last_lr()[0]
        loss = engine.train_batch(batches)
        progress.iteration += 1
        progress.consumed_train_samples += global_batch_size
        step = Step(progress.iteration, loss.detach(), learning_rate, is_last=progress.iteration == train_iters)
        for callback in callbacks:
            callback.after_step(step)


def seed_dropout(seed: int, iteration: int, data_rank: int) -> None:
    """Make a step's dropout a function of the run's seed, the step and the data-parallel rank.

    So a resumed run draws what an uninterrupted one does, without any generator state in its checkpoints.
    """
    digest = hashlib.sha256(f"dropout {seed} {iteration} {data_rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
