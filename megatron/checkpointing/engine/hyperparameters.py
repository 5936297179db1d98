"""Keeps what the configuration says of the optimizer from being replaced by what a checkpoint says of it.

DeepSpeed saves weight decay, betas, epsilon, the clipping threshold and the limits of fp16's loss scale beside the
optimizer's state, and loads them with it: a key that was changed for a resume would have no effect.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

STATE_OF_GROUPS = ("params", "step", "lr")  # the steps are apex's count, and the schedule sets the learning rate
STATE_OF_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@contextmanager
def configured_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Keeps the hyperparameters of DeepSpeed's `optimizer` as they are while the body loads its state.

    Of a dynamic loss scale, the place of the search is loaded into one; a fixed scale stays as it is.
    """
    groups = [
        {key: value for key, value in group.items() if key not in STATE_OF_GROUPS}
        for group in optimizer.optimizer.param_groups
    ]
    clip_grad = optimizer.clip_grad
    scaler = None if isinstance(optimizer, BF16_Optimizer) else optimizer.loss_scaler
    yield
    for group, own in zip(optimizer.optimizer.param_groups, groups, strict=True):
        group.update(own)
    optimizer.clip_grad = clip_grad
    if scaler is not None:
        _take_search(scaler, optimizer.loss_scaler)
        optimizer.loss_scaler = scaler
        optimizer.dynamic_loss_scale = scaler.dynamic


def _take_search(scaler: Any, loaded: Any) -> None:
    if scaler is loaded or not (scaler.dynamic and loaded.dynamic):
        return
    for name in STATE_OF_SCALE:
        setattr(scaler, name, getattr(loaded, name))
    scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
    scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)
