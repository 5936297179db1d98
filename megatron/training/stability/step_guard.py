"""Inspects the losses and gradients of every step before the optimizer sees them; all ranks decide alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, distributed

from megatron.config.sections.training import PrecisionConfig
from megatron.mpu.agreement import gather_objects
from megatron.mpu.context import ParallelContext
from megatron.training.stop_request import StopRequest

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@dataclass(frozen=True)
class Evidence:
    """One rank's observations of a step that is not finite."""

    rank: int
    data_rank: int
    bad_losses: list[int]
    """Micro batches whose loss is NaN or infinite, counted from 0; known on the last pipeline stage."""
    bad_gradients: bool
    """Whether the gradients that this rank has accumulated are not finite."""


class StepGuard:
    """Leaves out, on all ranks, a step that is not finite on any of them, and knows the samples to blame.

    The engine calls `inspect` after the last backward pass (deepspeed_patches.py), with what each rank has seen of its
    own gradients before they went into sums (gradients/reduction.py), so that the rank and the samples can be named.
    What one rank finds, all learn from one small sum, which carries requests to stop as well, and doubts whether the
    run's folder is still its own. DeepSpeed skips a step whose norm is not finite and leaves the schedule and the
    weights as they were; the guard makes the norm so where it condemns the step, also when only a loss is bad.

    fp16 with a dynamic scale is left to DeepSpeed to judge, since it overflows while it searches for its scale.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        context: ParallelContext,
        precision: PrecisionConfig,
        stop: StopRequest,
        passes: int = 1,
    ) -> None:
        """Takes the number of times in a row that the engine computes each micro batch: `passes`."""
        self.engine = engine
        self.passes = passes
        self.context = context
        self.stop = stop
        self._has_dynamic_scale = precision.dtype == "fp16" and precision.loss_scale == 0
        self.evidence: list[Evidence] = []
        self.condemned = False
        """Whether all ranks must leave the step out."""
        self._scale_before = math.inf

    @property
    def scaler(self) -> DynamicLossScaler | None:
        """Returns fp16's search for a scale; None without one."""
        return self.engine.optimizer.loss_scaler if self._has_dynamic_scale else None

    @property
    def step_was_left_out(self) -> bool:
        """Tells whether the last step changed no weight because it was not finite, in fp16's search for a scale too."""
        return bool(self.engine.optimizer.overflow)

    @property
    def step_was_bad(self) -> bool:
        """Tells whether the last step was left out and no search for a scale explains it; the same on every rank."""
        return self.step_was_left_out and not self._has_dynamic_scale

    @property
    def scale_is_stuck(self) -> bool:
        """Tells whether the last step overflowed at the smallest dynamic scale of fp16."""
        scaler = self.scaler
        return scaler is not None and self.step_was_left_out and self._scale_before <= scaler.min_scale

    def inspect(self, bad_gradients: Tensor) -> None:
        """Looks for NaN and infinity in this rank's losses of the step. Collective over all ranks.

        `bad_gradients` tells whether its gradients have some, as a boolean on the engine's device. Where any rank has
        found some, the step is condemned, and `evidence` says who has found what.
        """
        engine = self.engine
        self.evidence = []
        scaler = self.scaler
        if scaler is not None:
            self._scale_before = scaler.cur_scale
            # DeepSpeed would raise a bare Exception where `scale_is_stuck` has something to say.
            scaler.raise_error_at_min_scale = False
        bad_loss = _any_bad(engine.fwd_outputs, engine)
        own = torch.tensor([self.stop.requested, self.stop.lease_is_in_doubt()], device=engine.device)
        flags = torch.cat([(bad_loss | bad_gradients).reshape(1), own]).int()
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        bad, stop, in_doubt = flags.tolist()
        self.stop.agreed = self.stop.agreed or bool(stop)
        self.stop.lease_must_be_checked = bool(in_doubt)
        self.condemned = bool(bad) and scaler is None
        if self.condemned:
            self.evidence = self._gather_evidence(bool(bad_gradients))

    def judged(self, square: Tensor) -> Tensor:
        """Returns a squared norm, or NaN in a step that is condemned."""
        return torch.full_like(square, math.nan) if self.condemned else square

    def _gather_evidence(self, bad_gradients: bool) -> list[Evidence]:
        bad = (number for number, loss in enumerate(self.engine.fwd_outputs) if not torch.isfinite(loss))
        losses = list(dict.fromkeys(number // self.passes for number in bad))
        seen = gather_objects(Evidence(distributed.get_rank(), self.context.data_rank, losses, bad_gradients))
        return [evidence for evidence in seen if evidence.bad_losses or evidence.bad_gradients]


def _any_bad(tensors: list[Tensor], engine: PipelineEngine) -> Tensor:
    """Tells whether any element of any tensor is NaN or infinite, as a boolean on the engine's device."""
    if not tensors:
        return torch.zeros((), dtype=torch.bool, device=engine.device)
    return ~torch.isfinite(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf))
