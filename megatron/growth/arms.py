"""Arms of an experiment on growth: runs that differ in their seed alone, at the learning rate that suits them best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.config.sections.growth import GrowthRules
from megatron.growth.compare_curves import Estimate, Spread, mean_of, pooled_spread
from megatron.growth.loss_curves import LossCurve
from megatron.monitor.format_quantities import format_count


@dataclass(frozen=True)
class Arm:
    """Runs of one kind at the learning rate that suits them best."""

    name: str
    runs: tuple[LossCurve, ...]
    """One for each seed, at the best learning rate."""
    all_runs: tuple[LossCurve, ...]
    """Those of all learning rates."""

    @property
    def rates_tried(self) -> int:
        """Returns the number of learning rates among which the best was chosen."""
        return len({run.learning_rate for run in self.all_runs})

    @property
    def first(self) -> LossCurve:
        """Returns one of its runs, for what all of them share."""
        return self.runs[0]

    @property
    def has_grown(self) -> bool:
        """Tells whether its runs have grown."""
        return bool(self.first.growths)

    @property
    def factor(self) -> float | None:
        """Returns the growth factor of all growths together, beside the embedding."""
        return float(np.prod([event.factor for event in self.first.growths])) if self.has_grown else None

    @property
    def growth_at(self) -> float | None:
        """Returns the share of the whole cost that was spent before the last growth."""
        return self.first.growths[-1].flops / self.first.flops if self.has_grown else None

    @property
    def tokens_per_parameter(self) -> float:
        """Returns the tokens of the whole run for each parameter that the model ends with."""
        return self.first.tokens / self.first.parameters

    def loss(self, spread: Spread | None = None) -> Estimate:
        """Estimates the final loss, with the spread over its own seeds or one that is known better [nat/token]."""
        return mean_of([run.loss for run in self.runs], spread)


def shared_spread(arms: Sequence[Arm]) -> Spread:
    """Estimates the spread of final losses over seeds that all arms share [nat/token]."""
    return pooled_spread([[run.loss for run in arm.runs] for arm in arms])


def make_arms(runs: Sequence[tuple[str | None, LossCurve]]) -> list[Arm]:
    """Groups runs into arms, by the names that are given or by what they are, and chooses each one's learning rate.

    The rate is that of the lowest mean final loss over the seeds that all of its rates have.
    """
    groups: dict[str, list[LossCurve]] = defaultdict(list)
    for name, run in runs:
        groups[name or describe(run)].append(run)
    return [_with_best_rate(name, group) for name, group in groups.items()]


def describe(run: LossCurve) -> str:
    """Describes a run by sizes, growth, rules that are not the default, and cost."""
    cost = f"{run.flops:.2g} FLOP"
    if not run.growths:
        return f"{format_count(run.parameters)} from scratch, {cost}"
    event = run.growths[-1]
    defaults = {name: field.default for name, field in GrowthRules.model_fields.items()}
    rules = {name: value for name, value in run.rules.items() if name in defaults and name != "operator"}
    changed = "".join(f", {name} {value}" for name, value in rules.items() if value not in (defaults[name], None))
    operator = run.rules.get("operator", "grown")
    return f"{operator} {event.factor:.2g}x at {event.flops / run.flops:.0%}{changed}, {cost}"


def _with_best_rate(name: str, runs: Sequence[LossCurve]) -> Arm:
    by_rate: dict[float, list[LossCurve]] = defaultdict(list)
    for run in runs:
        by_rate[run.learning_rate].append(run)
    shared = set.intersection(*({run.seed for run in group} for group in by_rate.values()))

    def mean_loss(rate: float) -> float:
        counted = [run.loss for run in by_rate[rate] if not shared or run.seed in shared]
        return float(np.mean(counted))

    chosen = by_rate[min(by_rate, key=mean_loss)]
    return Arm(name, tuple(sorted(chosen, key=lambda run: run.seed)), tuple(runs))
