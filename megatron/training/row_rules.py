"""Learning rate, freezing and weight decay by row after a growth, on the flat partitions of ZeRO-1.

The optimizer steps as ever, whichever class computes it; the rules act before and after its step. A learning rate that
is multiplied by m changes a weight by m times as much, its decoupled decay included, so the step of such rows is taken
back to that share. A weight decay of the rows' own takes the place of the optimizer's by the difference of the two.
Frozen rows and their moments are put back as they were. Rows lie anywhere in the flat partition that a data-parallel
rank steps; their places follow from the shares that DeepSpeed has given to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron.checkpointing.engine.flat_partitions import Fragment, grouped_fragments
from megatron.config.optimizer import OptimizerConfig, facts_of
from megatron.config.sections.growth import GrowthRecord, GrowthRules
from megatron.model.new_rows import local_old_rows
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowRates:
    """Factors on the learning rate of one step."""

    everything: float = 1.0
    """Of all rows, as the schedule shows it."""
    old: float = 1.0
    """Of the rows that were there before growth; 0 freezes them."""
    new: float = 1.0
    """Of the rows that growth has added."""


def row_rates(rules: GrowthRules, steps: int) -> RowRates:
    """Returns the factors of a step, `steps` [steps] after growth.

    A warmup takes `rewarm_iters` steps, the first of them at 0, as that of the schedule does.
    """
    warmup = min(steps / rules.rewarm_iters, 1.0) if rules.rewarm_iters else 1.0
    return RowRates(
        everything=warmup if rules.learning_rate == "rewarm_all" else 1.0,
        old=rules.old_rows_lr if steps < rules.old_rows_iters else 1.0,
        new=warmup if rules.learning_rate == "rewarm_new" else 1.0,
    )


@dataclass(frozen=True)
class _Part:
    """A range of a flat partition with rows of one age, of one parameter."""

    place: slice
    is_new: bool
    decays: bool


@dataclass(frozen=True)
class _Kept:
    """Values of a part before the step."""

    part: _Part
    weights: Tensor
    moments: dict[str, Tensor]


class RowRules:
    """The rules of one growth, on one rank. Once they have run out, nothing of them is left in a step."""

    def __init__(
        self, engine: PipelineEngine, record: GrowthRecord, section: OptimizerConfig, context: ParallelContext
    ) -> None:
        optimizer: Any = engine.optimizer
        self.record = record
        self.rates = RowRates()
        self._scheduler = engine.lr_scheduler
        self._moments = facts_of(section).moments
        self._base: torch.optim.Optimizer = optimizer.optimizer
        self._old_rows = {
            parameter: local_old_rows(name, parameter_spec(parameter), record, context)
            for name, parameter in engine.module.global_parameters()
        }
        self._parts = {
            flat: list(self._parts_of(fragments))
            for group, fragments in zip(self._base.param_groups, grouped_fragments(optimizer), strict=True)
            for flat in group["params"]
        }
        self._kept: dict[Tensor, list[_Kept]] = {}
        self._hooks: list[Any] = []

    def _parts_of(self, fragments: list[Fragment]) -> Iterator[_Part]:
        """Yields the parts of the partition of one group; its padding is in none."""
        for fragment in fragments:
            parameter, first = fragment.parameter, fragment.place.start
            first_new = self._old_rows[parameter] * (parameter.numel() // parameter.shape[0])
            num_old = min(max(first_new - fragment.own.start, 0), fragment.size)
            decays = parameter_spec(parameter).decays
            for start, stop, is_new in ((0, num_old, False), (num_old, fragment.size, True)):
                if start < stop:
                    yield _Part(slice(first + start, first + stop), is_new, decays)

    def begin_step(self, iteration: int) -> None:
        """Sets the rates of the step that follows `iteration` steps."""
        rules = self.record.rules
        rates = row_rates(rules, iteration - self.record.iteration)
        if rates != self.rates:
            self.rates = rates
            self._scheduler.scale(rates.everything)
        acts = (rates.old, rates.new) != (1.0, 1.0) or rules.new_rows_weight_decay is not None
        if acts and not self._hooks:
            self._hooks = [
                self._base.register_step_pre_hook(lambda base, arguments, options: self._before_step(base)),
                self._base.register_step_post_hook(lambda base, arguments, options: self._after_step(base)),
            ]
        elif not acts and self._hooks:
            logger.info("step %d: from here on, rows from before and after growth train alike", iteration)
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    @torch.no_grad()
    def drop_frozen_gradients(self, slices: Sequence[Tensor]) -> None:
        """Makes the gradients of frozen rows zero, before they count in any norm, in the partitions of all groups."""
        if self.rates.old != 0.0:
            return
        for parts, gradient in zip(self._parts.values(), slices, strict=True):
            for part in parts:
                if not part.is_new:
                    gradient[part.place].zero_()

    @torch.no_grad()
    def _before_step(self, base: torch.optim.Optimizer) -> None:
        self._kept = {
            flat: [self._keep(base, flat, part) for part in self._parts[flat] if self._has_rule(part)]
            for group in base.param_groups
            for flat in group["params"]
        }

    def _has_rule(self, part: _Part) -> bool:
        own_decay = part.is_new and part.decays and self.record.rules.new_rows_weight_decay is not None
        return own_decay or self._rate(part) != 1.0

    def _rate(self, part: _Part) -> float:
        return self.rates.new if part.is_new else self.rates.old

    def _is_frozen(self, part: _Part) -> bool:
        return not part.is_new and self.rates.old == 0.0

    def _keep(self, base: torch.optim.Optimizer, flat: Tensor, part: _Part) -> _Kept:
        state = base.state.get(flat, {}) if self._is_frozen(part) else {}
        moments = {name: state[name][part.place].clone() for name in self._moments if name in state}
        return _Kept(part, flat[part.place].clone(), moments)

    @torch.no_grad()
    def _after_step(self, base: torch.optim.Optimizer) -> None:
        for group in base.param_groups:
            for flat in group["params"]:
                for kept in self._kept.pop(flat):
                    self._put_right(flat, kept, group, base.state[flat])

    def _put_right(self, flat: Tensor, kept: _Kept, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        part, weights, rate = kept.part, flat[kept.part.place], self._rate(kept.part)
        if self._is_frozen(part):
            weights.copy_(kept.weights)
            for name, moment in kept.moments.items():
                state[name][part.place].copy_(moment)
            return
        if rate != 1.0:
            weights.copy_(torch.lerp(kept.weights, weights, rate))
        decay = self.record.rules.new_rows_weight_decay
        if part.is_new and part.decays and decay is not None:
            weights.add_(kept.weights, alpha=group["lr"] * rate * (group["weight_decay"] - decay))
