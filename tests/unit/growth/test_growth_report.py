"""The report on growth against curves whose answer is known in closed form."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from scipy import stats

from megatron.errors import DataError
from megatron.growth.arms import make_arms
from megatron.growth.compare_curves import (
    Saving,
    equal_loss_saving,
    mean_of,
    paired_differences,
    pooled_spread,
    recovery,
    unpaired_difference,
)
from megatron.growth.loss_curves import LossCurve, read_curve
from megatron.growth.verdict import judge, verdict
from tests.helpers.loss_curves import LARGE, SMALL, TOKENS_PER_STEP, CurveWriter, Loss
from tools import growth_report

EXPONENT = 0.3


def power_law(factor: float, floor: float = 2.0) -> Loss:
    return lambda step: floor + factor * step**-EXPONENT


@pytest.fixture
def curves(tmp_path: Path) -> CurveWriter:
    return CurveWriter(tmp_path)


def read(words: str) -> LossCurve:
    return read_curve(words)[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_costs_count_everything_that_led_to_a_run(curves: CurveWriter) -> None:
    """200 steps of the small model, of which the large one branches off after 100."""
    small = curves.write("small", SMALL, power_law(3.0), range(10, 201, 10))
    large = curves.write("large", LARGE, power_law(3.0), range(110, 151, 10))
    curve = read(f"{small}+{large}")
    costs = [curves.flops_per_step(sizes) for sizes in (SMALL, LARGE)]
    assert list(curve.valid.steps) == list(range(10, 151, 10))
    assert curve.flops == 100 * costs[0] + 50 * costs[1]
    assert curve.tokens == 150 * TOKENS_PER_STEP
    (event,) = curve.growths
    assert (event.step, event.flops, event.tokens) == (100, 100 * costs[0], 100 * TOKENS_PER_STEP)
    assert event.factor == pytest.approx(2.0, rel=1e-2), "beside the embedding, of which the norm does not grow"


def test_a_stage_that_restarts_adds_its_steps(curves: CurveWriter) -> None:
    small = curves.write("small", SMALL, power_law(3.0), range(10, 101, 10))
    large = curves.write("large", LARGE, power_law(3.0), range(10, 51, 10), finetune=True, load=small)
    curve = read(f"{small}+{large}")
    costs = [curves.flops_per_step(sizes) for sizes in (SMALL, LARGE)]
    assert list(curve.valid.steps) == list(range(10, 151, 10))
    assert curve.flops == 100 * costs[0] + 50 * costs[1]
    assert curve.growths[0].step == 100


def test_equal_loss_saving_of_a_power_law(curves: CurveWriter) -> None:
    """A run that has reached after 1,000 steps what the control needs 1000 (3.0 / 2.7)^(1 / 0.3) for."""
    control = read(curves.write("control", LARGE, power_law(3.0), range(10, 2001, 10)))
    better = read(curves.write("better", LARGE, power_law(2.7), range(10, 1001, 10)))
    worse = read(curves.write("worse", LARGE, power_law(3.3), range(10, 1001, 10)))
    for run, factor in ((better, 2.7), (worse, 3.3)):
        exact = 1.0 - (factor / 3.0) ** (1 / EXPONENT)
        saving = equal_loss_saving(run, [control])
        assert saving.bound == "exact"
        assert saving.share == pytest.approx(exact, abs=1e-4)


def test_a_saving_beyond_what_was_measured_is_a_bound(curves: CurveWriter) -> None:
    control = read(curves.write("control", LARGE, power_law(3.0), range(100, 1001, 100), every=100))
    best = read(curves.write("best", LARGE, lambda step: 2.0, range(10, 501, 10)))
    worst = read(curves.write("worst", LARGE, lambda step: 9.0, range(10, 501, 10)))
    assert equal_loss_saving(best, [control]) == Saving(0.5, "at least")
    assert equal_loss_saving(worst, [control]) == Saving(-4.0, "at most")


def test_between_controls_of_two_budgets_only_their_ends_count(curves: CurveWriter) -> None:
    """In the middle of a schedule the rate is high and the loss too: ends at 4.0 and 3.0 nat, cost doubled."""
    short = read(curves.write("short", LARGE, lambda step: 4.0 if step == 100 else 9.0, range(10, 101, 10)))
    long = read(curves.write("long", LARGE, lambda step: 3.0 if step == 200 else 9.0, range(10, 201, 10)))
    run = read(curves.write("run", LARGE, lambda step: 3.25, range(10, 101, 10)))
    assert equal_loss_saving(run, [short, long]).share == pytest.approx(1.0 - 2.0**-0.75, rel=1e-12)


def test_recovery_of_a_jump_that_falls_straight(curves: CurveWriter) -> None:
    """From 4.0 up by 0.5 and down by 0.005 a step: back after 100 steps, even with the ungrown run after 200."""
    small = curves.write("small", SMALL, lambda step: 4.0 - 0.0025 * max(step - 100, 0), range(10, 601, 10))
    falling = curves.write("large", LARGE, lambda step: 4.5 - 0.005 * (step - 100), range(110, 501, 10))
    grown, twin = read(f"{small}+{falling}"), read(small)
    found = recovery(grown, twin)
    assert found is not None
    assert found.jump == pytest.approx(0.45, abs=1e-12), "of the first validation, ten steps later"
    assert (found.steps_to_before, found.steps_to_twin, found.has_twin) == (100, 200, True)
    alone = recovery(grown, None)
    assert alone is not None
    assert (alone.steps_to_before, alone.steps_to_twin, alone.has_twin) == (100, None, False)


def test_a_twin_counts_only_while_it_has_the_same_learning_rate(curves: CurveWriter) -> None:
    small = curves.write("small", SMALL, lambda step: 4.0, range(10, 601, 10), rate=lambda step: 1e-3 - 1e-6 * step)
    rewarmed = curves.write("rewarmed", LARGE, lambda step: 3.0, range(110, 501, 10), rate=lambda step: 2e-3)
    found = recovery(read(f"{small}+{rewarmed}"), read(small))
    assert found is not None
    assert not found.has_twin
    assert found.steps_to_twin is None


def test_a_run_that_never_comes_back_says_so(curves: CurveWriter) -> None:
    small = curves.write("small", SMALL, lambda step: 4.0, range(10, 101, 10))
    large = curves.write("large", LARGE, lambda step: 4.5, range(110, 201, 10))
    found = recovery(read(f"{small}+{large}"), None)
    assert found is not None
    assert found.steps_to_before is None


def test_the_spread_is_students(curves: CurveWriter) -> None:
    """Differences of mean 0.2 and standard deviation 0.1, paired by seed though the seeds differ by whole nats."""

    def write(name: str, slope: float) -> list[LossCurve]:
        losses = {seed: seed + slope * seed for seed in (1, 2, 3)}
        return [
            read(curves.write(f"{name}{seed}", LARGE, lambda step, loss=loss: loss, range(10, 21), seed=seed))
            for seed, loss in losses.items()
        ]

    ours, theirs = write("a", 0.1), write("b", 0.0)
    found = mean_of(paired_differences(ours, theirs) or [])
    assert found.mean == pytest.approx(0.2, abs=1e-12)
    assert found.half_width == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3), rel=1e-9)
    assert paired_differences(ours, theirs[:2]) is None, "the third seed has no partner"
    unpaired = unpaired_difference(ours, theirs[:2])
    losses = [[run.loss for run in runs] for runs in (ours, theirs[:2])]
    interval = stats.ttest_ind(*losses, equal_var=False).confidence_interval()
    assert (unpaired.low, unpaired.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert mean_of([1.0]).half_width == math.inf
    assert mean_of([1.0, 2.0, 3.0], comparisons=5).half_width == pytest.approx(stats.t.ppf(0.995, 2) / math.sqrt(3))


def test_arms_share_their_spread() -> None:
    """The residual mean square of a one-way analysis of variance, as scipy's F statistic implies it."""
    samples = [[1.0, 2.0, 4.0], [0.0, 0.5, 0.1], [7.0], [3.0, 3.5]]
    spread = pooled_spread(samples)
    assert spread.freedom == 5
    several = [sample for sample in samples if len(sample) > 1]
    values = [value for sample in several for value in sample]
    mean = sum(values) / len(values)
    between = sum(len(sample) * (sum(sample) / len(sample) - mean) ** 2 for sample in several) / (len(several) - 1)
    assert between / spread.deviation**2 == pytest.approx(stats.f_oneway(*several).statistic, rel=1e-12)
    assert mean_of([7.0], spread).half_width == pytest.approx(stats.t.ppf(0.975, 5) * spread.deviation)


def write_experiment(curves: CurveWriter, gap: float, noise: float) -> list[str]:
    """Three seeds of a small, a large and a grown model of equal cost, and how to name them.

    The large one ends 0.1 above the small one; the grown one ends `gap` above it, with a standard deviation of `noise`.
    """
    costs = [curves.flops_per_step(sizes) for sizes in (SMALL, LARGE)]
    total = 400 * costs[0] + 400 * costs[1]
    ends = [total // cost // 20 * 20 for cost in costs]
    words = []
    for seed in (1, 2, 3):
        level = 3.0 + 0.01 * seed

        def falling(above: float, low: float = level) -> Loss:
            return lambda step: low + above + max(400 - step, 0) / 400

        def write(name: str, sizes: dict[str, int], above: float, steps: range, seed: int = seed) -> str:
            return curves.write(f"{name}{seed}", sizes, falling(above), steps, seed=seed, every=20)

        small = write("small", SMALL, 0.0, range(20, ends[0] + 1, 20))
        grown = write("grown", LARGE, gap + noise * (seed - 2), range(420, 801, 20))
        words += [small, write("large", LARGE, 0.1, range(20, ends[1] + 1, 20)), f"zero_key={small}+{grown}"]
    return words


@pytest.mark.parametrize(
    ("gap", "noise", "sentence"),
    [
        (-0.05, 0.001, "Grow: zero_key ends 0.050 nat below"),
        (0.05, 0.001, "Do not grow: zero_key ends 0.050 nat above"),
        (0.002, 0.02, "No difference above what the spread lets us see"),
    ],
)
def test_the_verdict(
    gap: float, noise: float, sentence: str, curves: CurveWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = write_experiment(curves, gap, noise)
    output = tmp_path / "report"
    assert growth_report.main([*words, "--output", str(output)]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(sentence)
    assert "the small model alone at equal FLOPs" in said
    assert "2x at" in said and "tokens per parameter" in said and "3 seeds" in said
    assert said in (output / "report.md").read_text()
    assert imread(output / "report.png").shape[0] > 500
    rows = {row["arm"]: row for row in rows_of(output / "arms.csv")}
    assert len(rows) == 3
    grown = rows["zero_key"]
    assert float(grown["above_small"]) == pytest.approx(gap, abs=1e-6)
    assert float(grown["above_scratch"]) == pytest.approx(gap - 0.1, abs=1e-6)
    assert float(grown["growth_factor"]) == pytest.approx(2.0, rel=1e-2)
    assert len(rows_of(output / "runs.csv")) == 9


def test_the_learning_rate_of_every_arm_is_its_best(curves: CurveWriter) -> None:
    """Rates are compared on the seeds that all of them have: a lucky single seed does not count against three."""
    runs = []
    for rate, seeds in ((1e-3, (1, 2, 3)), (3e-3, (1,)), (1e-2, (1,))):
        for seed in seeds:
            loss = {1e-3: 3.0, 3e-3: 3.2, 1e-2: 4.0}[rate] + (0.3 if seed != 1 else 0.0)
            folder = curves.write(
                f"{rate}-{seed}", LARGE, lambda step, loss=loss: loss, range(10, 21), seed=seed, lr=rate
            )
            runs.append(read(folder))
    (arm,) = make_arms([(None, run) for run in runs])
    assert [(run.learning_rate, run.seed) for run in arm.runs] == [(1e-3, 1), (1e-3, 2), (1e-3, 3)]
    assert arm.rates_tried == 3
    assert len(arm.all_runs) == 5


def test_without_a_run_of_equal_cost_or_a_second_seed_there_is_no_verdict(curves: CurveWriter) -> None:
    small = curves.write("small", SMALL, power_law(3.0), range(10, 101, 10))
    large = curves.write("large", LARGE, power_law(3.0), range(110, 201, 10))
    grown = read(f"{small}+{large}")
    assert verdict(judge(make_arms([(None, grown), (None, read(small))]))).startswith("No verdict: no run")
    steps = grown.flops / curves.flops_per_step(LARGE)
    scratch = read(curves.write("scratch", LARGE, power_law(3.0), range(10, round(steps / 10) * 10 + 1, 10)))
    assert verdict(judge(make_arms([(None, grown), (None, scratch)]))).startswith("No verdict: one seed")


def test_costs_that_a_run_counts_itself_are_taken(curves: CurveWriter) -> None:
    """A run that grows in its course, and one that has loaded a smaller model: both know what came before."""
    run = Path(curves.write("run", SMALL, power_law(3.0), range(10, 101, 10)))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["training_flops"] = 1e9 + 1e6 * row["iteration"]
    sizes = [{"qkv": n, "proj": n, "ffn": 2 * n, "num_layers": 2} for n in (24, 48)]
    event = {
        "iteration": 50, "event": "growth", "text": "", "operator": "zero_key", "training_flops": 1.05e9,
        "before": sizes[0], "after": sizes[1], "parameters_before": 34_880, "parameters_after": 53_312,
    }  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (*rows[:5], event, *rows[5:])))
    curve = read(str(run))
    assert list(curve.valid.flops) == [row["training_flops"] for row in rows]
    (growth,) = curve.growths
    assert (growth.step, growth.flops, growth.tokens) == (50, 1.05e9, 50 * TOKENS_PER_STEP)
    assert growth.factor == pytest.approx(2.0, rel=1e-2)
    assert (curve.first_parameters, curve.parameters) == (34_880, 53_312)


def test_sizes_without_growth_are_compared_at_equal_cost(
    curves: CurveWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = [curves.flops_per_step(sizes) for sizes in (SMALL, LARGE)]
    ends = [40 * costs[1] // cost * 10 for cost in costs]
    runs = [
        curves.write(name, sizes, lambda step, loss=loss: loss, range(10, end + 1, 10))
        for name, sizes, loss, end in (("small", SMALL, 3.0, ends[0]), ("large", LARGE, 3.1, ends[1]))
    ]
    assert growth_report.main([*runs, "--output", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "parameters 3.000" in said and "parameters 3.100" in said
    assert "the smallest is the best, so that growing has little to win." in said
    assert "verdict:" not in said.lower()


def test_damaged_lines_are_left_out_and_named(
    curves: CurveWriter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = curves.write("run", SMALL, power_law(3.0), range(10, 101, 10))
    file = Path(run) / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:6], '{"loss": 3}', *lines[6:], lines[9][:30]]))
    assert growth_report.main([run, "--output", str(tmp_path / "report")]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert [line.partition(": left out")[0] for line in warned] == [f"warning: {file}:{n}" for n in (4, 7, 12)]
    assert all(f"{file}:{number}" in (tmp_path / "report" / "report.md").read_text() for number in (4, 7, 12))
    assert list(read(run).valid.steps) == [10, 20, 30, 50, 60, 70, 80, 90, 100]


def test_a_run_that_diverged_is_worse_than_any(curves: CurveWriter, tmp_path: Path) -> None:
    """JSON has no NaN: the loss is null, and the learning rate is not the best one."""
    rates = {1e-3: 3.0, 1e-1: 2.0}
    folders = [
        curves.write(f"{rate}", LARGE, lambda step, loss=loss: loss, range(10, 31, 10), lr=rate)
        for rate, loss in rates.items()
    ]
    file = Path(folders[1]) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in (*rows[:2], rows[2] | {"valid/lm_loss": None})))
    assert read(folders[1]).loss == math.inf
    (arm,) = make_arms([(None, read(folder)) for folder in folders])
    assert arm.first.learning_rate == 1e-3
    assert growth_report.main([*(f"$a|b={folder}" for folder in folders), "--output", str(tmp_path / "report")]) == 0
    assert "| $a\\|b |" in (tmp_path / "report" / "report.md").read_text()


def test_what_is_no_run_is_refused(curves: CurveWriter, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        read(str(tmp_path / "nothing"))
    run = curves.write("run", SMALL, power_law(3.0), range(10, 101, 10), every=1000)
    with pytest.raises(DataError, match="no validation loss"):
        read(run)
    described = Path(run) / "run.json"
    described.write_text(json.dumps({"config": {}}))
    with pytest.raises(DataError, match=r"run\.json: damaged"):
        read(run)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"before": {"qkv": "24", "num_layers": 2}}, "before.qkv"),
        ({"after": None}, "after: "),
        ({"parameters_after": None}, "parameters_after"),
        ({"training_flops": []}, "training_flops"),
    ],
)
def test_a_damaged_growth_is_named(damage: dict[str, Any], words: str, curves: CurveWriter, tmp_path: Path) -> None:
    file = Path(curves.write("run", SMALL, power_law(3.0), range(10, 101, 10))) / "metrics.jsonl"
    sizes = {"qkv": 24, "proj": 24, "ffn": 48, "num_layers": 2}
    event = {"iteration": 50, "event": "growth", "before": sizes, "after": sizes}
    event |= {"parameters_before": 34_880, "parameters_after": 34_880} | damage
    file.write_text(file.read_text() + json.dumps(event) + "\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl: the growth of iteration 50 is damaged \({words}"):
        read(str(file.parent))
