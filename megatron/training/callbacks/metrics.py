"""Writes the metrics of training to the monitor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor, distributed

from megatron.data.micro_batch import MicroBatch
from megatron.errors import UserError
from megatron.monitor.throughput import TimedIterator, peak_memory_gib
from megatron.mpu.agreement import rank_and_size
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.step_parts import PartTimes
from megatron.training.training_context import TrainingContext


class Metrics(Callback):
    """Writes a record every `log_interval` steps, after every evaluation, before growth, and at the end of the run."""

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.losses: dict[str, list[Tensor]] = {}
        self.parts: PartTimes | None = None
        self._observing = ExitStack()

    def wrap_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Times how long the engine waits for its training data."""
        self.batches = TimedIterator(batches)
        return self.batches

    def start(self) -> None:
        """Begins to time the parts of the steps, where that is asked for."""
        if self.context.run.config.monitor.log_part_times:
            self.parts = PartTimes(self.context.progress.iteration)
            self._observing.enter_context(self.context.run.parts.observed(self.parts.observe))

    def finish(self) -> None:
        """Stops timing them."""
        self._observing.close()

    def on_error(self, error: UserError) -> None:
        """Stops timing them."""
        self._observing.close()

    def after_step(self, step: Step) -> None:
        """Collects the losses, and reports their means since the last record when it is time.

        Steps that were left out do not count in the means.
        """
        for name, loss in step.losses.items():
            of_name = self.losses.setdefault(name, [])
            if not step.left_out:
                of_name.append(loss)
        context, run = self.context, self.context.run
        ends = step.ends_run or step.grows or context.stop.agreed
        if not (step.iteration % run.config.monitor.log_interval == 0 or step.metrics or ends):
            return
        losses = {f"train/{name}": _mean(values) for name, values in self.losses.items()}
        self.losses.clear()
        record = {
            "consumed_tokens": context.consumed_tokens,
            "training_flops": context.progress.training_flops,
            **losses,
            "train/learning_rate": step.learning_rate,
            "train/grad_norm": float(run.engine.get_global_grad_norm()),
            "train/skipped_steps": run.engine.skipped_steps,
            "train/memory_gib": peak_memory_gib(),
            **context.throughput.measure(step.iteration, self.batches.wait_seconds),
            **rank_spread(run.watchdog.own_step_seconds(), run.engine.device),
            **step.metrics,
        }
        if self.parts is not None:
            saves = record.get("train/save_wait_seconds", 0.0)
            record |= self.parts.measure(step.iteration, saves, run.engine.device)
        context.monitor.write(step.iteration, record)


def _mean(losses: list[Tensor]) -> float:
    """Returns the mean of a record's losses; NaN where all steps were left out."""
    return float(torch.stack(losses).double().mean()) if losses else math.nan


def rank_spread(seconds: float, device: torch.device) -> dict[str, float]:
    """Returns the spread over the ranks of the time of a step that is not spent waiting for others. Collective.

    `seconds` is this rank's [s]. Stages of a pipeline that have more work take longer. Nothing for one rank alone.
    """
    rank, size = rank_and_size()
    if size == 1:
        return {}
    own = torch.zeros(size, dtype=torch.float64, device=device)
    own[rank] = seconds
    distributed.all_reduce(own)
    return {
        "train/rank_seconds_min": float(own.min()),
        "train/rank_seconds_median": float(own.median()),
        "train/rank_seconds_max": float(own.max()),
        "train/slowest_rank": int(own.argmax()),
    }
