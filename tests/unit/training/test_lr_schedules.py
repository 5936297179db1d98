"""The learning rate against values that the published implementation returned (GPT-NeoX's AnnealingLR)."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.config.sections.training import LRDecayStyle, LRScheduleConfig
from megatron.training.lr_schedules import LR_DECAYS, LRScheduler, lr_at

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
def test_other_decays_in_closed_form(style: LRDecayStyle, step: int, expected: float) -> None:
    schedule = LRScheduleConfig(style=style, warmup=0.1, min_lr=0.1)
    assert lr_at(step, peak=1.0, schedule=schedule, train_iters=100) == pytest.approx(expected, rel=1e-12)


def test_decay_iters_overrides_train_iters() -> None:
    schedule = LRScheduleConfig(style="linear", warmup=0.0, decay_iters=50)
    assert lr_at(25, peak=1.0, schedule=schedule, train_iters=100) == pytest.approx(0.5)
    assert lr_at(60, peak=1.0, schedule=schedule, train_iters=100) == 0.0


def test_every_style_of_the_configuration_is_registered() -> None:
    assert set(LRDecayStyle.__args__) == set(LR_DECAYS)  # type: ignore[attr-defined]


def test_scheduler_sets_every_group_and_resumes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter]}], lr=123.0)
    schedule = LRScheduleConfig(style="cosine", warmup=0.1, min_lr=6e-5)
    scheduler = LRScheduler(optimizer, peak=6e-4, schedule=schedule, train_iters=30)
    assert optimizer.param_groups[0]["lr"] == 0.0
    for _ in range(12):
        scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.0004649999999999999, rel=1e-12)]
    resumed = LRScheduler(optimizer, peak=6e-4, schedule=schedule, train_iters=30)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr()
