"""The learning rate against values that the published implementation returned (GPT-NeoX's AnnealingLR)."""

from __future__ import annotations

import math

import pytest

from megatron.config.learning_rate import LRScheduleConfig, lr_at

# (steps, warmup): {step: learning rate} for cosine from 6e-4 to 6e-5.
PUBLISHED = {
    (143000, 0.01): {
        0: 0.0,
        1: 4.195804195804195e-07,
        10: 4.195804195804195e-06,
        1429: 0.0005995804195804195,
        1430: 0.0006,
        1431: 0.0005999999999335199,
        10000: 0.0005951320808998975,
        71500: 0.0003342838102353981,
        100000: 0.00017387308050660708,
        142998: 6.000000026592002e-05,
        142999: 6.000000006648001e-05,
        143000: 6e-05,
    },
    (60000, 0.01): {
        599: 0.0005989999999999999,
        600: 0.0006,
        601: 0.000599999999622375,
        30000: 0.00033428381023539814,
        59999: 6.0000000377624914e-05,
        60000: 6e-05,
    },
    (30, 0.1): {
        1: 0.00019999999999999998,
        3: 0.0006,
        4: 0.0005981743565903246,
        12: 0.0004649999999999999,
        21: 0.00019500000000000002,
        29: 6.182564340967539e-05,
        30: 6e-05,
    },
}


@pytest.mark.parametrize("steps, warmup", PUBLISHED)
def test_cosine_is_the_published_schedule(steps: int, warmup: float) -> None:
    schedule = LRScheduleConfig(style="cosine", warmup=warmup, min_lr=6e-5)
    for step, published in PUBLISHED[steps, warmup].items():
        assert lr_at(step, peak=6e-4, schedule=schedule, train_iters=steps) == pytest.approx(published, rel=1e-12)


def test_cosine_stays_at_the_minimum_where_the_published_one_rises_again() -> None:
    schedule = LRScheduleConfig(style="cosine", warmup=0.01, min_lr=6e-5)
    assert lr_at(150000, peak=6e-4, schedule=schedule, train_iters=143000) == 6e-5


@pytest.mark.parametrize(
    "style, step, expected",
    [
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 100, 0.1),
        ("exponential", 55, math.exp(-0.5)),
        ("exponential", 300, math.exp(-1.0)),
        ("inverse_sqrt", 10, 1.0),
        ("inverse_sqrt", 40, 0.5),
    ],
)
def test_other_decays_in_closed_form(style: str, step: int, expected: float) -> None:
    schedule = LRScheduleConfig(style=style, warmup=0.1, min_lr=0.1)
    assert lr_at(step, peak=1.0, schedule=schedule, train_iters=100) == pytest.approx(expected, rel=1e-12)


def test_decay_iters_overrides_train_iters() -> None:
    schedule = LRScheduleConfig(style="linear", warmup=0.0, decay_iters=50)
    assert lr_at(25, peak=1.0, schedule=schedule, train_iters=100) == pytest.approx(0.5)
    assert lr_at(60, peak=1.0, schedule=schedule, train_iters=100) == 0.0


def published_wsd(step: int, style: str, warmup: int, end: int, anneal: int, peak: float, minimum: float) -> float:
    """The published formula (Megatron-LM, core/optimizer_param_scheduler.py), for an initial rate of 0."""
    if warmup > 0 and step <= warmup:
        return peak * step / warmup
    if step > end:
        return minimum
    if step <= end - anneal:
        return peak
    ratio = (step - (end - anneal)) / anneal
    left = {
        "linear": 1 - ratio,
        "cosine": 0.5 * (math.cos(math.pi * ratio) + 1),
        "exponential": 2 * 0.5**ratio - 1,
        "minus_sqrt": 1 - ratio**0.5,
    }
    return minimum + left[style] * (peak - minimum)


# Rates at steps 10 (end of the warmup), 80 (last at the peak), 85, 90, 99 and 100 of 100, from 1.0 to 0.1, the last 20
# steps annealed.
WSD_VALUES = {
    "linear": [1.0, 1.0, 0.775, 0.55, 0.145, 0.1],
    "cosine": [1.0, 1.0, 0.8681980515339464, 0.55, 0.10554024673218806, 0.1],
    "exponential": [1.0, 1.0, 0.7136135474566861, 0.47279220613578565, 0.13173843145723985, 0.1],
    "minus_sqrt": [1.0, 1.0, 0.55, 0.36360389693210715, 0.1227885089671933, 0.1],
}


@pytest.mark.parametrize("style", WSD_VALUES)
def test_wsd_is_the_published_schedule(style: str) -> None:
    schedule = LRScheduleConfig(style="WSD", warmup=0.1, min_lr=0.1, wsd_decay_style=style, wsd_decay_iters=20)
    rates = [lr_at(step, peak=1.0, schedule=schedule, train_iters=100) for step in range(131)]
    assert [rates[step] for step in (10, 80, 85, 90, 99, 100)] == pytest.approx(WSD_VALUES[style], rel=1e-12)
    expected = [published_wsd(step, style, 10, 100, 20, 1.0, 0.1) for step in range(131)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("warmup", "decay_iters", "wsd_decay_iters"),
    [(0.0, None, 1), (0.0, None, 100), (0.5, None, 80), (0.25, 40, 40), (0.25, 400, 100)],
)
def test_wsd_at_its_edges(warmup: float, decay_iters: int | None, wsd_decay_iters: int) -> None:
    """All of the schedule is annealed, or one step; the decay begins within the warmup; the run ends before it."""
    schedule = LRScheduleConfig(
        style="WSD", warmup=warmup, decay_iters=decay_iters, min_lr=6e-5, wsd_decay_iters=wsd_decay_iters
    )
    end = decay_iters or 100
    for step in range(120):
        expected = published_wsd(step, "exponential", int(warmup * end), end, wsd_decay_iters, 6e-4, 6e-5)
        assert lr_at(step, peak=6e-4, schedule=schedule, train_iters=100) == pytest.approx(expected, rel=1e-12)


def test_other_styles_are_saved_as_before_wsd() -> None:
    """In the words of the checkpoints that exist; what was set all the same is not lost."""
    saved = (
        '{"style":"cosine","warmup":0.01,"decay_iters":null,"min_lr":0.0,"override_lr_scheduler":false,'
        '"use_checkpoint_lr_scheduler":false}'
    )
    schedule = LRScheduleConfig.model_validate_json(saved)
    assert schedule.model_dump_json() == saved
    for style in ("cosine", "WSD"):
        annealed = LRScheduleConfig(style=style, wsd_decay_style="linear", wsd_decay_iters=3)
        assert LRScheduleConfig.model_validate_json(annealed.model_dump_json()) == annealed
    assert '"wsd_decay_style":"exponential"' in LRScheduleConfig(style="WSD", wsd_decay_iters=3).model_dump_json()
