"""What happens around the steps: evaluation, metrics, checkpoints. One concern per class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from megatron.checkpointing.engine.saving import Saver
from megatron.checkpointing.store.run_state import RunState
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import TrainingConfig
from megatron.monitor.monitor import Monitor
from megatron.monitor.throughput import Throughput, TimedIterator, peak_memory_gib
from megatron.training.evaluate import evaluate, loss_metrics
from megatron.training.step import Progress, Step
from megatron.training.stop_request import StopRequest

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
        stop: StopRequest,
    ) -> None:
        self.engine = engine
        self.batches = batches
        self.progress = progress
        self.throughput = throughput
        self.training = training
        self.global_batch_size = global_batch_size
        self.stop = stop

    def before_training(self) -> None:
        """Nothing to prepare."""

    def after_step(self, step: Step) -> None:
        """Add valid/lm_loss and valid/perplexity to the step's metrics when it is time.

        A validation that a request to stop cuts short is not made up for, and its samples count as read: every later
        one sees what it would have seen.
        """
        if step.iteration % self.training.eval_interval == 0 or step.is_last:
            with self.throughput.paused():
                loss = evaluate(self.engine, self.batches, self.training.eval_iters, self.stop)
            if loss is not None:
                step.metrics.update(loss_metrics("valid", loss))
            self.progress.consumed_valid_samples += self.training.eval_iters * self.global_batch_size


class FinalTest:
    """Evaluates on the test data after the last step."""

    def __init__(
        self,
        engine: PipelineEngine,
        batches: Iterator[Any],
        eval_iters: int,
        throughput: Throughput,
        stop: StopRequest,
    ) -> None:
        self.engine = engine
        self.batches = batches
        self.eval_iters = eval_iters
        self.throughput = throughput
        self.stop = stop

    def before_training(self) -> None:
        """Nothing to prepare."""

    def after_step(self, step: Step) -> None:
        """Add test/lm_loss and test/perplexity to the last step's metrics."""
        if step.is_last:
            with self.throughput.paused():
                loss = evaluate(self.engine, self.batches, self.eval_iters, self.stop)
            if loss is not None:
                step.metrics.update(loss_metrics("test", loss))


class LogMetrics:
    """Writes a record every `log_interval` steps, after every evaluation, and at the end of the run."""

    def __init__(
        self,
        engine: PipelineEngine,
        monitor: Monitor,
        throughput: Throughput,
        batches: TimedIterator[Any],
        progress: Progress,
        seq_length: int,
        log_interval: int,
        stop: StopRequest,
    ) -> None:
        self.engine = engine
        self.monitor = monitor
        self.throughput = throughput
        self.batches = batches
        self.progress = progress
        self.seq_length = seq_length
        self.log_interval = log_interval
        self.stop = stop
        self.losses: list[torch.Tensor] = []

    def before_training(self) -> None:
        """Nothing to prepare."""

    def after_step(self, step: Step) -> None:
        """Collect the loss, and report its mean since the last record when it is time; steps left out do not count."""
        if not step.left_out:
            self.losses.append(step.loss)
        ends = step.ends_run or self.stop.agreed
        if not (step.iteration % self.log_interval == 0 or step.metrics or ends):
            return
        loss = float(torch.stack(self.losses).double().mean()) if self.losses else math.nan
        self.losses.clear()
        record = {
            "consumed_tokens": self.progress.consumed_train_samples * self.seq_length,
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
    """Saves after the steps of the schedule, when the run is to stop, and at its end; the initial weights as well when
    the schedule has step 0.

    `unchanging` gives the parts of the saved state that stay the same over a run; the rest comes from `progress`.
    `versions` are of the packages and the code.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        iterations: frozenset[int],
        progress: Progress,
        unchanging: RunState,
        config: RunConfig,
        throughput: Throughput,
        stop: StopRequest,
        *,
        run_id: str,
        versions: Mapping[str, str | None],
    ) -> None:
        self.engine = engine
        self.iterations = iterations
        self.progress = progress
        self.unchanging = unchanging
        self.throughput = throughput
        self.stop = stop
        self.saver = Saver(engine, config, run_id=run_id, versions=versions)

    def before_training(self) -> None:
        """Save the initial weights of a run that starts from step 0."""
        if self.progress.iteration == 0 and 0 in self.iterations:
            self._save(wait=False)

    def after_step(self, step: Step) -> None:
        """Save when it is time, and publish what was saved before and is written by now."""
        ends = step.ends_run or self.stop.agreed
        if step.iteration in self.iterations or ends:
            self._save(wait=ends)
        elif self.saver.is_saving:
            with self.throughput.saving():
                self.saver.publish_if_written()

    def finish(self) -> None:
        """Publish what is still being written."""
        self.saver.finish()

    def _save(self, *, wait: bool) -> None:
        state = replace(self.unchanging, **asdict(self.progress), schedule_steps=self.engine.lr_scheduler.num_steps)
        with self.throughput.saving():
            self.saver.save(state, wait=wait)
