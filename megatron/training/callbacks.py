"""What happens around the steps: validation, metrics, checkpoints. One concern per class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron.checkpointing.folder import RunState
from megatron.checkpointing.save_load import save_checkpoint
from megatron.config.run import RunConfig
from megatron.config.training import TrainingConfig
from megatron.monitor.throughput import Throughput, TimedIterator, peak_memory_gib
from megatron.monitor.writers import Monitor
from megatron.training.evaluate import evaluate, loss_metrics
from megatron.training.progress import Progress, Step

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


class Validate:
    """Evaluates on the validation data every `eval_interval` steps and at the end of the run."""

    def __init__(
        self,
        engine: PipelineEngine,
        batches: Iterator[Any],
        progress: Progress,
        training: TrainingConfig,
        global_batch_size: int,
        throughput: Throughput,
    ) -> None:
        self.engine = engine
        self.batches = batches
        self.progress = progress
        self.throughput = throughput
        self.training = training
        self.global_batch_size = global_batch_size

    def before_training(self) -> None:
        """Nothing to prepare."""

    def after_step(self, step: Step) -> None:
        """Add valid/lm_loss and valid/perplexity to the step's metrics when it is time."""
        if step.iteration % self.training.eval_interval == 0 or step.is_last:
            with self.throughput.paused():
                loss = evaluate(self.engine, self.batches, self.training.eval_iters)
            step.metrics.update(loss_metrics("valid", loss))
            self.progress.consumed_valid_samples += self.training.eval_iters * self.global_batch_size


class LogMetrics:
    """Writes a record every `log_interval` steps, after every evaluation, and at the end of the run."""

    def __init__(
        self,
        engine: PipelineEngine,
        monitor: Monitor,
        throughput: Throughput,
        batches: TimedIterator[Any],
        log_interval: int,
    ) -> None:
        self.engine = engine
        self.monitor = monitor
        self.throughput = throughput
        self.batches = batches
        self.log_interval = log_interval
        self.losses: list[torch.Tensor] = []

    def before_training(self) -> None:
        """Nothing to prepare."""

    def after_step(self, step: Step) -> None:
        """Collect the loss, and report its mean since the last record when it is time."""
        self.losses.append(step.loss)
        if not (step.iteration % self.log_interval == 0 or step.metrics or step.is_last):
            return
        loss = float(torch.stack(self.losses).double().mean())
        self.losses.clear()
        record = {
            "consumed_tokens": step.iteration * self.throughput.tokens_per_step,
            "train/lm_loss": loss,
            "train/learning_rate": step.learning_rate,
            "train/grad_norm": float(self.engine.get_global_grad_norm()),
            "train/skipped_steps": self.engine.skipped_steps,
            "train/memory_gib": peak_memory_gib(),
            **self.throughput.measure(step.iteration, self.batches.wait_seconds),
            **step.metrics,
        }
        self.monitor.write(step.iteration, record)


class SaveCheckpoints:
    """Saves after the steps of the schedule, and the initial weights when the schedule has step 0.

    `unchanging` gives the parts of the saved state that stay the same over a run; the rest comes from `progress`.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        iterations: frozenset[int],
        progress: Progress,
        unchanging: RunState,
        config: RunConfig,
        throughput: Throughput,
    ) -> None:
        self.engine = engine
        self.iterations = iterations
        self.progress = progress
        self.unchanging = unchanging
        self.config = config
        self.throughput = throughput

    def before_training(self) -> None:
        """Save the initial weights of a run that starts from step 0."""
        if self.progress.iteration == 0 and 0 in self.iterations:
            self._save()

    def after_step(self, step: Step) -> None:
        """Save when it is time."""
        if step.iteration in self.iterations or step.is_last:
            self._save()

    def _save(self) -> None:
        state = replace(self.unchanging, **asdict(self.progress))
        with self.throughput.paused():
            save_checkpoint(self.engine, state, self.config)
