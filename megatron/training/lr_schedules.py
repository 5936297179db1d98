"""Learning rate as a function of the optimizer step: linear warmup, then one of the registered decays.

The arithmetic is GPT-NeoX's: step k, counted from 0, uses `lr_at(k)`, so that the first step of a run with a warmup
has learning rate 0 (its moments still update). One thing differs on purpose: after the end of the decay the rate stays
at its last value, where the published cosine rises again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron.config.sections.training import LRScheduleConfig
from megatron.registry import Registry


@dataclass(frozen=True)
class DecayPoint:
    """A step after the warmup and not after the end, all in optimizer steps."""

    step: float
    warmup: float
    end: float

    @property
    def progress(self) -> float:
        """0 at the end of the warmup, 1 at the end of the decay."""
        return (self.step - self.warmup) / (self.end - self.warmup) if self.end > self.warmup else 1.0


Decay = Callable[[DecayPoint, float, float], float]
"""(point, peak, minimum) -> learning rate, before it is floored at the minimum."""

LR_DECAYS: Registry[Decay] = Registry("learning-rate schedule")


@LR_DECAYS.register("constant")
def constant(point: DecayPoint, peak: float, minimum: float) -> float:
    """The peak, for ever."""
    return peak


@LR_DECAYS.register("linear")
def linear(point: DecayPoint, peak: float, minimum: float) -> float:
    """Straight from the peak towards 0."""
    return peak * (1.0 - point.progress)


@LR_DECAYS.register("cosine")
def cosine(point: DecayPoint, peak: float, minimum: float) -> float:
    """Half a cosine wave from the peak to the minimum."""
    return minimum + (peak - minimum) / 2.0 * (math.cos(math.pi * point.progress) + 1.0)


@LR_DECAYS.register("exponential")
def exponential(point: DecayPoint, peak: float, minimum: float) -> float:
    """A factor of e over the whole decay, as in GPT-NeoX."""
    return peak * math.exp(-point.progress)


@LR_DECAYS.register("inverse_sqrt")
def inverse_sqrt(point: DecayPoint, peak: float, minimum: float) -> float:
    """Falls with the root of the step count, from the peak at the end of the warmup (Vaswani et al. 2017, eq. 3)."""
    return peak * math.sqrt(max(point.warmup, 1.0) / max(point.step, 1.0))


def lr_at(step: int, *, peak: float, schedule: LRScheduleConfig, train_iters: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    end = schedule.decay_iters or train_iters
    warmup = schedule.warmup * end
    if warmup > 0 and step <= warmup:
        return peak * step / warmup
    point = DecayPoint(step=min(step, end), warmup=warmup, end=end)
    return max(LR_DECAYS[schedule.style](point, peak, schedule.min_lr), schedule.min_lr)


class LRScheduler:
    """Sets the learning rate of every parameter group; DeepSpeed calls `step` after each step that was not skipped."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, peak: float, schedule: LRScheduleConfig, train_iters: int
    ) -> None:
        self.optimizer = optimizer
        self.peak = peak
        self.schedule = schedule
        self.train_iters = train_iters
        self.num_steps = 0
        self._apply()

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.num_steps += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The learning rate that the next optimizer step uses, once per parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Steps taken. The shape of the schedule is configuration, not state."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved step with the schedule that this run configures."""
        self.num_steps = state["num_steps"]
        self._apply()

    def _apply(self) -> None:
        lr = lr_at(self.num_steps, peak=self.peak, schedule=self.schedule, train_iters=self.train_iters)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
