"""fp16's search for a loss scale, with DeepSpeed's own scaler: fp16 does not train on a CPU."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron.config.sections.training import BatchConfig, NonFiniteConfig, PrecisionConfig
from megatron.errors import NonFiniteError
from megatron.mpu.context import ParallelContext
from megatron.training.progress import Progress
from megatron.training.stability.non_finite import must_roll_back
from megatron.training.stability.step_guard import StepGuard
from megatron.training.stop_request import StopRequest
from tests.helpers.distributed import run_distributed

BATCH = BatchConfig(micro_batch_size=2, gradient_accumulation_steps=1, data_parallel_size=1)
ADVICE = "fp16 gradients overflow although the loss scale is at its smallest.*bfloat16.*learning rate.*min_loss_scale"


class Run:
    """Stand-in for the engine as the guard sees it, with steps that overflow or do not."""

    def __init__(self, scale: float, *, loss_scale: float = 0.0) -> None:
        deepspeed.init_distributed("gloo", verbose=False)
        scaler = DynamicLossScaler(scale, 100, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False)
        self.optimizer: Any = SimpleNamespace(loss_scaler=scaler, overflow=False)
        self.engine: Any = SimpleNamespace(
            optimizer=self.optimizer,
            device=torch.device("cpu"),
            fwd_outputs=[torch.zeros(())],
        )
        precision = PrecisionConfig(dtype="fp16", loss_scale=loss_scale)
        self.guard = StepGuard(self.engine, ParallelContext.single(), precision, StopRequest())
        self.progress = Progress()

    def step(self, *, overflows: bool, policy: str = "stop") -> bool:
        """Takes a step as the pipeline engine and then the loop do; returns whether to roll back."""
        self.guard.inspect(torch.tensor(overflows))
        square = self.guard.judged(torch.tensor(torch.inf if overflows else 1.0))
        self.optimizer.overflow = not bool(torch.isfinite(square))
        self.optimizer.loss_scaler.update_scale(self.optimizer.overflow)
        self.progress.iteration += 1
        config = NonFiniteConfig.model_validate({"policy": policy})
        return must_roll_back(self.guard, self.progress, config, BATCH)

    @property
    def scale(self) -> float:
        return float(self.optimizer.loss_scaler.cur_scale)


def _search(policy: str) -> None:
    run = Run(8.0)
    for scale in (4.0, 2.0, 1.0):
        assert not run.step(overflows=True, policy=policy)
        assert run.scale == scale
        assert run.guard.step_was_left_out
    assert not run.step(overflows=False, policy=policy)
    assert not run.guard.step_was_left_out
    assert run.progress.non_finite_steps == 0, "the search is not charged to the budget"


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_the_search_for_a_scale_is_left_to_itself(policy: str) -> None:
    run_distributed(_search, 1, policy)


def _stuck(policy: str, resumed: bool) -> None:
    run = Run(2.0)
    run.step(overflows=True, policy=policy)
    if resumed:
        # DeepSpeed puts the saved scaler in the place of the engine's.
        run.optimizer.loss_scaler = copy.deepcopy(run.optimizer.loss_scaler)
        run.optimizer.loss_scaler.raise_error_at_min_scale = True
    assert run.scale == 1.0
    with pytest.raises(NonFiniteError, match=ADVICE):
        run.step(overflows=True, policy=policy)


@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_scale_stuck_at_its_minimum_ends_the_run_with_advice(policy: str, resumed: bool) -> None:
    run_distributed(_stuck, 1, policy, resumed)


def _fixed() -> None:
    run = Run(128.0, loss_scale=128.0)
    with pytest.raises(NonFiniteError, match="step 1: NaN or infinity in the gradient on rank 0"):
        run.step(overflows=True)
    assert not run.step(overflows=True, policy="skip")
    assert run.progress.non_finite_steps == 2
    assert run.step(overflows=True, policy="rollback")


def test_an_overflow_of_a_fixed_scale_is_judged_by_the_policy() -> None:
    run_distributed(_fixed, 1)
