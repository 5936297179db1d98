"""Verdict on growth: what grown runs have gained or lost against runs that never grew, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron.growth.arms import Arm
from megatron.growth.compare_curves import (
    SAME_COST,
    Estimate,
    Recovery,
    Saving,
    equal_loss_saving,
    mean_of,
    paired_differences,
    pooled_spread,
    recovery,
    same_cost,
    unpaired_difference,
)
from megatron.growth.loss_curves import LossCurve
from megatron.monitor.format_quantities import format_count


@dataclass(frozen=True)
class Outcome:
    """A grown arm against runs that never grew; None where there are none of that kind."""

    arm: Arm
    scratch: Arm | None
    """The final model from scratch, at equal cost."""
    small: Arm | None
    """The first model alone, at equal cost."""
    scratch_full: Arm | None
    """The final model from scratch, on as many tokens."""
    against: Mapping[str, Estimate]
    """Final loss above that of the three, by their names here [nat/token]."""
    savings: tuple[Saving, ...]
    """Share of the cost from scratch for the same loss, by run."""
    recoveries: tuple[Recovery, ...]

    @property
    def control(self) -> str | None:
        """Returns the name of the better one of the two at equal cost."""
        arms = {"scratch": self.scratch, "small": self.small}
        present = {name: arm.loss().mean for name, arm in arms.items() if arm is not None}
        return min(present, key=lambda name: present[name]) if present else None


CONTROLS = ("scratch", "small", "scratch_full")


def judge(arms: Sequence[Arm], twins: Sequence[LossCurve] = ()) -> list[Outcome]:
    """Compares every grown arm with the arms that never grew, and its runs with those of `twins` that did not grow.

    Differences from one kind of competitor share their spread over seeds; their intervals hold for all grown arms at
    once.
    """
    grown = [arm for arm in arms if arm.has_grown]
    ungrown = [arm for arm in arms if not arm.has_grown]
    chosen = [_competitors(arm, ungrown) for arm in grown]
    against: list[dict[str, Estimate]] = [{} for _ in grown]
    for name in CONTROLS:
        pairs = {
            index: paired_differences(grown[index].runs, others[name].runs)
            for index, others in enumerate(chosen)
            if name in others
        }
        spread = pooled_spread([values for values in pairs.values() if values is not None])
        for index, values in pairs.items():
            if values is None:
                found = unpaired_difference(grown[index].runs, chosen[index][name].runs, len(grown))
            else:
                found = mean_of(values, spread, len(grown))
            against[index][name] = found
    return [
        _outcome(arm, others, estimates, ungrown, twins)
        for arm, others, estimates in zip(grown, chosen, against, strict=True)
    ]


def _competitors(arm: Arm, ungrown: Sequence[Arm]) -> dict[str, Arm]:
    run = arm.first
    final = [other for other in ungrown if other.first.parameters == run.parameters]
    first = [other for other in ungrown if other.first.parameters == run.first_parameters]
    found = {
        "scratch": _best(other for other in final if same_cost(other.first.flops, run.flops)),
        "small": _best(other for other in first if same_cost(other.first.flops, run.flops)),
        "scratch_full": _best(other for other in final if same_cost(other.first.tokens, run.tokens)),
    }
    return {name: other for name, other in found.items() if other is not None}


def _outcome(
    arm: Arm,
    others: Mapping[str, Arm],
    against: Mapping[str, Estimate],
    ungrown: Sequence[Arm],
    twins: Sequence[LossCurve],
) -> Outcome:
    controls = [run for other in ungrown if other.first.parameters == arm.first.parameters for run in other.runs]
    return Outcome(
        arm=arm,
        scratch=others.get("scratch"),
        small=others.get("small"),
        scratch_full=others.get("scratch_full"),
        against=against,
        savings=tuple(equal_loss_saving(run, _of_seed(run, controls)) for run in arm.runs if controls),
        recoveries=tuple(found for run in arm.runs if (found := recovery(run, _twin(run, twins))) is not None),
    )


def _best(arms: Iterable[Arm]) -> Arm | None:
    return min(arms, key=lambda arm: arm.loss().mean, default=None)


def _of_seed(run: LossCurve, controls: Sequence[LossCurve]) -> Sequence[LossCurve]:
    return [control for control in controls if control.seed == run.seed] or controls


def _twin(run: LossCurve, twins: Sequence[LossCurve]) -> LossCurve | None:
    """Returns the run without growth that is what this one was before: its sizes, seed and learning rate."""
    same = (
        twin
        for twin in twins
        if not twin.growths
        and twin.parameters == run.first_parameters
        and (twin.seed, twin.learning_rate) == (run.seed, run.learning_rate)
    )
    return max(same, key=lambda twin: twin.flops, default=None)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Says in a sentence whether to grow, by how much at most, and at which size of effect the runs are blind."""
    judged = [outcome for outcome in outcomes if outcome.control is not None]
    if not judged:
        return "No verdict: no run that never grew has the cost of a grown one."
    # Of one with a single seed little is known: the surest counts, not the luckiest.
    best = min(judged, key=lambda outcome: _rank(outcome.against[outcome.control or ""]))
    name = best.control or ""
    control, gap = (best.scratch if name == "scratch" else best.small), best.against[name]
    what = "the large model from scratch" if name == "scratch" else "the small model alone"
    arm, seeds = best.arm, f"{gap.seeds} seed{'s' if gap.seeds > 1 else ''}"
    setting = (
        f"{arm.factor:.2g}x at {arm.growth_at:.0%} of {arm.first.flops:.2g} FLOP, "
        f"{arm.tokens_per_parameter:.1f} tokens per parameter"
    )
    missing = " (no run of the other kind to compare with)" if best.scratch is None or best.small is None else ""
    if math.isinf(gap.half_width) or control is None:
        return (
            f"No verdict: one seed has no spread. {arm.name} ends {gap.mean:+.3f} nat from {what}{missing} "
            f"at equal FLOPs ({setting})."
        )
    among = f", the best of {len(judged)} grown arms," if len(judged) > 1 else ""
    if gap.high < 0.0:
        return (
            f"Grow: {arm.name}{among} ends {-gap.mean:.3f} nat below {what}{missing} at equal FLOPs, at least "
            f"{-gap.high:.3f} and at most {-gap.low:.3f} ({setting}; {seeds}){_saving_words(best)}."
        )
    if gap.low > 0.0:
        return (
            f"Do not grow: {arm.name}{among} ends {gap.mean:.3f} nat above {what}{missing} at equal FLOPs, at least "
            f"{gap.low:.3f} and at most {gap.high:.3f} ({setting}; {seeds})."
        )
    return (
        f"No difference above what the spread lets us see ({gap.half_width:.3f} nat with {seeds}): {arm.name}{among} "
        f"ends {gap.mean:+.3f} nat from {what}{missing} at equal FLOPs, so growing gains at most {-gap.low:.3f} and "
        f"costs at most {gap.high:.3f} ({setting})."
    )


def _rank(gap: Estimate) -> tuple[float, float]:
    return gap.high, gap.mean


def gate(arms: Sequence[Arm]) -> str | None:
    """Says how models that never grew compare at equal FLOPs; None with fewer than two sizes.

    Where the smallest is the best, growing has little to win.
    """
    ungrown = [arm for arm in arms if not arm.has_grown]
    groups = [[other for other in ungrown if same_cost(other.first.flops, arm.first.flops)] for arm in ungrown]
    group = max(groups, key=len, default=[])
    group = sorted(group, key=lambda arm: arm.first.parameters)
    if len({arm.first.parameters for arm in group}) < 2:
        return None
    ends = ", ".join(
        f"{format_count(arm.first.parameters)} parameters {arm.loss().mean:.3f} "
        f"({arm.tokens_per_parameter:.0f} tokens per parameter, {len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''})"
        for arm in group
    )
    best = min(group, key=lambda arm: arm.loss().mean)
    so = "the smallest is the best, so that growing has little to win" if best is group[0] else "a larger one is better"
    return f"Without growth, at {group[0].first.flops:.2g} FLOP: {ends}: {so}."


def saving_of(outcome: Outcome) -> Estimate | None:
    """Estimates the share of the cost from scratch that is saved; None without controls of the final size."""
    return mean_of([saving.share for saving in outcome.savings]) if outcome.savings else None


def saving_bound(outcome: Outcome) -> str:
    """Returns `at least`, `at most` or nothing, for an estimate of which some part is only a bound."""
    bounds = {saving.bound for saving in outcome.savings} - {"exact"}
    return bounds.pop() if len(bounds) == 1 else "about" if bounds else ""


def _saving_words(outcome: Outcome) -> str:
    saving = saving_of(outcome)
    if saving is None:
        return ""
    bound = saving_bound(outcome)
    if bound == "at least" and saving.mean < SAME_COST:
        return ", a loss that no run from scratch has reached"
    spread = f" ± {saving.half_width:.0%}" if saving.seeds > 1 else ""
    share = f"{bound} {saving.mean:z.0%}".lstrip() + spread
    return f", and saves {share} of the FLOPs to that loss from scratch"
