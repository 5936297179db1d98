"""The learning-rate schedule on torch's optimizers."""

from __future__ import annotations

import pytest
import torch

from megatron.config.learning_rate import LRScheduleConfig
from megatron.training.lr_scheduler import LRScheduler


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


def test_a_factor_holds_until_it_is_replaced() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter]}], lr=1.0)
    schedule = LRScheduleConfig(style="constant", warmup=0.0)
    scheduler = LRScheduler(optimizer, peak=0.5, schedule=schedule, train_iters=30)
    scheduler.scale(0.25)
    assert scheduler.get_last_lr() == [0.125]
    scheduler.step()
    assert scheduler.get_last_lr() == [0.125]
    scheduler.scale(1.0)
    assert scheduler.get_last_lr() == [0.5]
