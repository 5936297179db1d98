"""What a checkpoint may not change of the optimizer that loads it; fp16's part, which does not run on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from megatron.checkpointing.engine.hyperparameters import configured_hyperparameters


def optimizer_with(scaler: Any, *, clip_grad: float = 1.0, **hyperparameters: Any) -> Any:
    adam = torch.optim.AdamW([torch.zeros(2)], **hyperparameters)
    return SimpleNamespace(
        optimizer=adam, clip_grad=clip_grad, loss_scaler=scaler, dynamic_loss_scale=scaler.dynamic, overflow=False
    )


def load(optimizer: Any, other: Any) -> None:
    """As DeepSpeed does."""
    optimizer.optimizer.load_state_dict(other.optimizer.state_dict())
    optimizer.loss_scaler, optimizer.dynamic_loss_scale = other.loss_scaler, other.dynamic_loss_scale
    optimizer.clip_grad = other.clip_grad


def dynamic(scale: float, *, min_scale: float = 1.0, hysteresis: int = 2, window: int = 100) -> DynamicLossScaler:
    return DynamicLossScaler(scale, window, min_scale, delayed_shift=hysteresis, consecutive_hysteresis=False)


def test_the_hyperparameters_stay_and_the_state_comes() -> None:
    ours = optimizer_with(LossScaler(1.0), clip_grad=0.5, lr=1e-3, betas=(0.5, 0.6), eps=1e-4, weight_decay=0.3)
    theirs = optimizer_with(LossScaler(1.0), clip_grad=2.0, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    with configured_hyperparameters(ours):
        load(ours, theirs)
    [group] = ours.optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-4, 0.3)
    assert ours.clip_grad == 0.5
    assert group["lr"] == 1e-2, "the schedule sets it afterwards"


def test_the_search_for_a_scale_goes_on_within_the_configured_limits() -> None:
    saved = dynamic(64.0)
    saved.cur_iter, saved.last_overflow_iter, saved.cur_hysteresis = 50, 40, 1
    ours = optimizer_with(own := dynamic(2.0**16, min_scale=0.25, hysteresis=3, window=7))
    with configured_hyperparameters(ours):
        load(ours, optimizer_with(saved))
    assert ours.loss_scaler is own
    assert (own.cur_scale, own.cur_iter, own.last_overflow_iter, own.cur_hysteresis) == (64.0, 50, 40, 1)
    assert (own.min_scale, own.scale_window, own.delayed_shift) == (0.25, 7, 3)

    ours = optimizer_with(dynamic(2.0**16, min_scale=128.0))
    with configured_hyperparameters(ours):
        load(ours, optimizer_with(saved))
    assert ours.loss_scaler.cur_scale == 128.0


def test_a_fixed_scale_is_the_configured_one() -> None:
    ours = optimizer_with(LossScaler(512.0))
    with configured_hyperparameters(ours):
        load(ours, optimizer_with(dynamic(64.0)))
    assert ours.loss_scaler.cur_scale == 512.0 and not ours.dynamic_loss_scale

    ours = optimizer_with(dynamic(2.0**16))
    with configured_hyperparameters(ours):
        load(ours, optimizer_with(LossScaler(512.0)))
    assert ours.loss_scaler.cur_scale == 2.0**16 and ours.dynamic_loss_scale
