"""Comparisons of loss curves: at their ends, at equal loss, and around a growth, with how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from megatron.growth.loss_curves import LossCurve, Series

SAME_COST = 0.02
"""Relative difference up to which two budgets count as equal."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and how far the true mean may be from it."""

    mean: float
    half_width: float
    """Half the 95 % confidence interval; infinity where nothing tells the spread."""
    seeds: int

    @property
    def low(self) -> float:
        """Returns the lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Returns the upper end of the interval."""
        return self.mean + self.half_width


@dataclass(frozen=True)
class Spread:
    """Standard deviation of a measurement over seeds, and the degrees of freedom that it was estimated with."""

    deviation: float
    freedom: int


def pooled_spread(samples: Sequence[Sequence[float]]) -> Spread:
    """Estimates the spread that all samples share, each around a mean of its own.

    Three seeds alone know their spread badly: Student's quantile is 4.3 with them, and 2.2 with five such samples.
    A sample with a run that diverged says nothing about it.
    """
    samples = [sample for sample in samples if all(map(math.isfinite, sample))]
    residuals = [value - float(np.mean(sample)) for sample in samples for value in sample]
    freedom = sum(len(sample) - 1 for sample in samples)
    return Spread(math.sqrt(math.fsum(each**2 for each in residuals) / freedom) if freedom else math.inf, freedom)


def mean_of(values: Sequence[float], spread: Spread | None = None, comparisons: int = 1) -> Estimate:
    """Estimates a mean by Student's t, with the values' own spread or one that is known better.

    With several `comparisons`, all intervals hold at once (Bonferroni).
    """
    spread = spread or pooled_spread([values])
    if spread.freedom == 0:
        return Estimate(float(np.mean(values)), math.inf, len(values))
    half_width = _quantile(spread.freedom, comparisons) * spread.deviation / math.sqrt(len(values))
    return Estimate(float(np.mean(values)), half_width, len(values))


def _quantile(freedom: float, comparisons: int) -> float:
    return float(stats.t.ppf(1.0 - (1.0 - CONFIDENCE) / 2.0 / comparisons, freedom))


def paired_differences(ours: Sequence[LossCurve], theirs: Sequence[LossCurve]) -> list[float] | None:
    """Returns our final losses less theirs, seed by seed; None unless they have each of our seeds once.

    Runs of one seed have read the same data, which takes its part out of the spread.
    """
    pairs = {run.seed: run.loss for run in theirs}
    if len(pairs) < len(theirs) or not {run.seed for run in ours} <= pairs.keys():
        return None
    return [run.loss - pairs[run.seed] for run in ours]


def unpaired_difference(ours: Sequence[LossCurve], theirs: Sequence[LossCurve], comparisons: int = 1) -> Estimate:
    """Estimates how far our final loss is above theirs, by Welch's interval [nat/token]."""
    losses = [[run.loss for run in runs] for runs in (ours, theirs)]
    mean = float(np.mean(losses[0]) - np.mean(losses[1]))
    seeds = min(map(len, losses))
    if seeds < 2:
        return Estimate(mean, math.inf, seeds)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in losses]
    if sum(parts) == 0.0:
        return Estimate(mean, 0.0, seeds)
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, losses, strict=True))
    return Estimate(mean, _quantile(freedom, comparisons) * math.sqrt(sum(parts)), seeds)


@dataclass(frozen=True)
class Saving:
    """Share of the control's cost that a run did without for the same loss; negative where it took more."""

    share: float
    bound: Literal["exact", "at least", "at most"] = "exact"
    """Whether the control reached the loss, never did, or was below it from its first record on."""


def equal_loss_saving(run: LossCurve, controls: Sequence[LossCurve]) -> Saving:
    """Computes 1 - C / C', where C is the run's cost and C' that at which the controls reach its final loss.

    With controls of several budgets, C' lies between their ends; with one, on its curve. Between two points, the loss
    is linear in the logarithm of the cost.
    """
    ends = _ends(controls)
    if len(ends) > 1:
        costs, losses = (np.array(column) for column in zip(*ends, strict=True))
    else:
        costs, losses = controls[0].valid.flops, controls[0].valid.values
    # The first time that a loss is reached counts, though noise may raise it again.
    lowest = np.minimum.accumulate(losses)
    reached = int(np.argmax(lowest <= run.loss))
    if not lowest[-1] <= run.loss:
        return Saving(1.0 - run.flops / float(costs[-1]), "at least")
    if reached == 0:
        bound: Literal["exact", "at most"] = "exact" if lowest[0] == run.loss else "at most"
        return Saving(1.0 - run.flops / float(costs[0]), bound)
    before, after = lowest[reached - 1], lowest[reached]
    share = (before - run.loss) / (before - after)
    cost = math.exp(math.log(costs[reached - 1]) + share * math.log(costs[reached] / costs[reached - 1]))
    return Saving(1.0 - run.flops / cost)


def _ends(controls: Sequence[LossCurve]) -> list[tuple[float, float]]:
    """Returns mean cost and mean final loss of the runs of each budget, by rising cost."""
    budgets: list[list[LossCurve]] = []
    for control in sorted(controls, key=lambda control: control.flops):
        if budgets and same_cost(budgets[-1][0].flops, control.flops):
            budgets[-1].append(control)
        else:
            budgets.append([control])
    return [
        (float(np.mean([run.flops for run in runs])), float(np.mean([run.loss for run in runs]))) for runs in budgets
    ]


@dataclass(frozen=True)
class Recovery:
    """Loss of a run at its last growth, and the steps until it was back; None where it never was."""

    jump: float
    """First validation loss after growth above the last one before [nat/token]."""
    steps_to_before: int | None
    """Steps until the validation loss was as low as before."""
    steps_to_twin: int | None
    """Steps until the training loss was as low as that of the run that did not grow, while both had one learning
    rate."""
    has_twin: bool


def recovery(run: LossCurve, twin: LossCurve | None) -> Recovery | None:
    """Measures the recovery from the last growth; None for a run that has not grown, or not been measured since."""
    if not run.growths:
        return None
    at = run.growths[-1].step
    before, after = run.valid.until(at), run.valid.since(at)
    if len(before.values) == 0 or len(after.values) == 0:
        return None
    level = float(before.values[-1])
    back = after.steps[after.values <= level]
    own, theirs = _shared(run.train.since(at), run, twin) if twin is not None else (None, None)
    caught = own.steps[own.values <= theirs.values] if own is not None and theirs is not None else np.array([])
    return Recovery(
        jump=float(after.values[0]) - level,
        steps_to_before=round(float(back[0]) - at) if len(back) else None,
        steps_to_twin=round(float(caught[0]) - at) if len(caught) else None,
        has_twin=own is not None and len(own.steps) > 0,
    )


def _shared(own: Series, run: LossCurve, twin: LossCurve) -> tuple[Series, Series]:
    """Returns both runs' training losses at the steps that both have recorded under one learning rate."""
    ours = dict(zip(run.rates.steps, run.rates.values, strict=True))
    theirs = dict(zip(twin.rates.steps, twin.rates.values, strict=True))
    same = [step for step in own.steps if step in ours and step in theirs and math.isclose(ours[step], theirs[step])]
    chosen = [series.where(np.isin(series.steps, same)) for series in (own, twin.train)]
    return chosen[0], chosen[1]


def same_cost(first: float, second: float) -> bool:
    """Tells whether two budgets are equal up to the rounding of steps."""
    return abs(first - second) <= SAME_COST * max(first, second)
