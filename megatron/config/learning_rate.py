"""Learning rate as a function of the optimizer step: linear warmup, then one of the registered decays.

The arithmetic is GPT-NeoX's: step k, counted from 0, uses `lr_at(k)`, so that the first step of a run with a warmup
has learning rate 0 (its moments still update). One thing differs on purpose: after the end of the decay the rate stays
at its last value, where the published cosine rises again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from megatron.config.bounds import NonNegative, StepCount
from megatron.config.section import Key, OneOf, Section
from megatron.registry import Registry


class LRScheduleConfig(Section):
    """Learning rate over steps."""

    style: Annotated[
        str, OneOf(lambda: LR_DECAYS), Key("lr_decay_style", difference="inverse_sqrt and WSD are not in NeoX")
    ] = "linear"
    """Shape of the decay after the warmup."""

    warmup: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of lr_decay_iters that warms up linearly from 0."""

    decay_iters: Annotated[StepCount | None, Key("lr_decay_iters")] = None
    """Steps until min_lr is reached [steps]; None means train_iters."""

    wsd_decay_style: Annotated[
        str, OneOf(lambda: WSD_DECAYS), Key("lr_wsd_decay_style", difference="Megatron-LM's key, not NeoX's")
    ] = "exponential"
    """Shape of the decay at the end of WSD (warmup, stable, decay); before it, the rate stays at its peak."""

    wsd_decay_iters: Annotated[
        StepCount | None,
        Key("lr_wsd_decay_iters", difference="Megatron-LM's key; the warmup stays NeoX's, a share of lr_decay_iters"),
    ] = None
    """Last steps of lr_decay_iters in which WSD decays to min_lr [steps]; required for WSD, unset otherwise."""

    min_lr: Annotated[NonNegative, Key(difference="also held after the end of the decay")] = 0.0
    """Smallest learning rate; held after the end of the decay."""

    override_lr_scheduler: bool = False
    """On resume, follow this schedule instead of the checkpoint's, whatever that was."""

    use_checkpoint_lr_scheduler: bool = False
    """On resume, follow the checkpoint's schedule instead of this one."""

    @model_serializer(mode="wrap")
    def _without_unused_wsd(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Configurations of other styles are saved as they were before WSD, so that older versions read them too.
        values: dict[str, Any] = dump(self)
        unused = {} if self.style == "WSD" else {"wsd_decay_style": "exponential", "wsd_decay_iters": None}
        return {name: value for name, value in values.items() if name not in unused or value != unused[name]}


@dataclass(frozen=True)
class DecayPoint:
    """A step after the warmup and not after the end, all in optimizer steps."""

    step: float
    warmup: float
    end: float

    @property
    def progress(self) -> float:
        """Returns 0 at the end of the warmup, 1 at the end of the decay."""
        return (self.step - self.warmup) / (self.end - self.warmup) if self.end > self.warmup else 1.0


Decay = Callable[[DecayPoint, float, LRScheduleConfig], float]
"""(point, peak, schedule) -> learning rate, before it is floored at the schedule's min_lr."""

LR_DECAYS: Registry[Decay] = Registry("learning-rate schedule")

WSD_DECAYS: Registry[Callable[[float], float]] = Registry("decay of a WSD schedule")
"""Share of the last phase of WSD that is over -> share of the way from min_lr up to the peak that is left."""


@LR_DECAYS.register("constant")
def constant(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Returns the peak, for ever."""
    return peak


@LR_DECAYS.register("linear")
def linear(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Falls straight from the peak towards 0."""
    return peak * (1.0 - point.progress)


@LR_DECAYS.register("cosine")
def cosine(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Falls along half a cosine wave from the peak to the minimum."""
    return schedule.min_lr + (peak - schedule.min_lr) / 2.0 * (math.cos(math.pi * point.progress) + 1.0)


@LR_DECAYS.register("exponential")
def exponential(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Falls by a factor of e over the whole decay, as in GPT-NeoX."""
    return peak * math.exp(-point.progress)


@LR_DECAYS.register("inverse_sqrt")
def inverse_sqrt(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Falls with the root of the step count, from the peak at the end of the warmup (Vaswani et al. 2017, eq. 3)."""
    return peak * math.sqrt(max(point.warmup, 1.0) / max(point.step, 1.0))


@LR_DECAYS.register("WSD")
def warmup_stable_decay(point: DecayPoint, peak: float, schedule: LRScheduleConfig) -> float:
    """Stays at the peak, then falls to the minimum over the last `wsd_decay_iters` steps (Hu et al. 2024,
    arXiv:2404.06395, section 4), in the shapes of Megatron-LM's `OptimizerParamScheduler`.

    The warmup is NeoX's, as for every style: a share of `decay_iters`, from learning rate 0, where Megatron-LM takes a
    number of steps and an initial rate. As there, a decay that begins within the warmup is partly over at its end.
    Raises ValueError without `wsd_decay_iters`, which validation requires.
    """
    if schedule.wsd_decay_iters is None:
        raise ValueError("the WSD schedule needs wsd_decay_iters")
    decayed = max(point.step - (point.end - schedule.wsd_decay_iters), 0.0) / schedule.wsd_decay_iters
    return schedule.min_lr + WSD_DECAYS[schedule.wsd_decay_style](decayed) * (peak - schedule.min_lr)


WSD_DECAYS.register("linear")(lambda decayed: 1.0 - decayed)
WSD_DECAYS.register("cosine")(lambda decayed: 0.5 * (math.cos(math.pi * decayed) + 1.0))
WSD_DECAYS.register("exponential")(lambda decayed: 2.0 * math.pow(0.5, decayed) - 1.0)
WSD_DECAYS.register("minus_sqrt")(lambda decayed: 1.0 - math.sqrt(decayed))


def lr_at(step: int, *, peak: float, schedule: LRScheduleConfig, train_iters: int) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0."""
    end = schedule.decay_iters or train_iters
    warmup = schedule.warmup * end
    if warmup > 0 and step <= warmup:
        return peak * step / warmup
    point = DecayPoint(step=min(step, end), warmup=warmup, end=end)
    return max(LR_DECAYS[schedule.style](point, peak, schedule), schedule.min_lr)
