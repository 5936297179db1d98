"""Accumulates a step's gradients in fp32, in one flat tensor for each optimizer group that stays from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from megatron.checkpointing.engine.flat_partitions import grouped_parameters


class FlatGradients:
    """The gradients of this rank's stage, laid out as the flat weights of DeepSpeed's `optimizer` are.

    A hook on each parameter takes its gradient from autograd as soon as it is complete: the first of a step is copied,
    so that nothing has to be made zero before, the others are added. An fp32 parameter's `.grad` then is its place in
    the flat tensor, to which autograd itself adds.
    """

    def __init__(self, optimizer: Any, is_there: Callable[[nn.Parameter], None]) -> None:
        """Registers the hooks, in the place of DeepSpeed's own; `is_there` hears of each gradient that has come."""
        self.groups = grouped_parameters(optimizer)
        self._is_there = is_there
        if isinstance(optimizer, BF16_Optimizer):
            # Its own buffers, views of which it gives to the optimizer.
            self.flat: list[Tensor] = optimizer.fp32_groups_gradients_flat
            self.flat_weights: list[Tensor] = optimizer.bf16_groups_flat
            optimizer.immediate_grad_update = True  # or it would look for gradients after each backward pass
            optimizer.clear_hp_grads = lambda: None
        else:
            self.flat_weights = optimizer.bit16_groups_flat
            self.flat = [torch.zeros_like(flat, dtype=torch.float32) for flat in self.flat_weights]
        self.views: dict[nn.Parameter, Tensor] = {}
        for parameters, flat in zip(self.groups, self.flat, strict=True):
            places = torch.split(
                flat[: sum(each.numel() for each in parameters)], [each.numel() for each in parameters]
            )
            self.views |= {each: place.view(each.shape) for each, place in zip(parameters, places, strict=True)}
        self._present: set[nn.Parameter] = set()
        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        # The engine removes these when it is destroyed.
        optimizer._grad_acc_hooks = [
            parameter.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for parameter in self.views
        ]

    def _take(self, parameter: nn.Parameter) -> None:
        view, gradient = self.views[parameter], cast(Tensor, parameter.grad)
        if parameter not in self._present:
            self._present.add(parameter)
            view.copy_(gradient)
        elif gradient.data_ptr() != view.data_ptr():
            view.add_(gradient)
        parameter.grad = view if parameter.dtype == view.dtype else None
        self._is_there(parameter)

    def clear_absent(self) -> None:
        """Makes the gradients zero that no micro batch of the step has had."""
        for parameter, view in self.views.items():
            if parameter not in self._present:
                view.zero_()

    def begin_step(self) -> None:
        """Drops the gradients of the step before."""
        self._present.clear()
        for parameter in self.views:
            parameter.grad = None
