"""An optimizer of the tests' own in its one file: AdaBelief (Zhuang et al. 2020, arXiv:2010.07468) without corrections.

Its moments have other names than AdamW's, it counts no steps, and all its parameters form one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import PositiveFloat

from megatron.config.optimizer import OPTIMIZERS, Implementation, OptimizerConfig, OptimizerFacts, ParameterGroup

NAME = "adabelief"
MOMENTS = ("momentum_average", "surprise_average")
KEYS: dict[str, Any] = {"optimizer": {"type": "AdaBelief", "params": {"lr": 1e-3, "decay": 0.9, "floor": 1e-3}}}


class AdaBeliefConfig(OptimizerConfig):
    """AdaBelief with one decay for both averages."""

    type: Literal["AdaBelief"] = "AdaBelief"
    """Name."""

    decay: PositiveFloat
    """Decay of both averages."""

    floor: PositiveFloat
    """Added to the root of the average surprise."""


class AdaBelief(torch.optim.Optimizer):
    """Steps along the average gradient, divided by the root of the average of (gradient - that average)^2."""

    def __init__(self, groups: Any, *, lr: float, decay: float, floor: float) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay, "floor": floor})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean, surprise = (state.setdefault(name, torch.zeros_like(parameter)) for name in MOMENTS)
                mean.lerp_(parameter.grad, 1.0 - group["decay"])
                surprise.lerp_((parameter.grad - mean).square(), 1.0 - group["decay"])
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, surprise.sqrt().add_(group["floor"]), value=-group["lr"])


def register() -> None:
    """Registers it in this process."""
    facts = OptimizerFacts(
        section=AdaBeliefConfig,
        moments=MOMENTS,
        squared_moments=MOMENTS[1:],
        groups=(ParameterGroup("all", lambda parameter: True, lambda section: {"weight_decay": section.weight_decay}),),
        implementations={
            "plain": Implementation(
                f"{__name__}:AdaBelief",
                lambda section: {"lr": section.lr, "decay": section.decay, "floor": section.floor},
                step_count=None,
            )
        },
    )
    OPTIMIZERS.register(NAME)(facts)


@contextmanager
def registered() -> Iterator[None]:
    """Registers it while the body runs."""
    register()
    try:
        yield
    finally:
        OPTIMIZERS.unregister(NAME)
