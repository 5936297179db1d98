"""What DeepSpeed 0.19.8 gets wrong between ranks, put right on the engine that it made.

Tested in tests/ranks/training/test_agreement.py, where each case fails or waits for ever without its repair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, distributed, nn

from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

WIDENED_AT_ONCE = 2**24
"""Gradient elements of which a float64 copy is made at a time."""


def repair(engine: PipelineEngine, context: ParallelContext) -> None:
    """Make gradient norms, overflow decisions and tied gradients those of the whole model, on every rank."""
    if isinstance(engine.optimizer, BF16_Optimizer):
        _repair_bf16_norm(engine.optimizer, context, engine.device)
    else:
        _repair_zero_norm(engine.optimizer, context, engine.device)
        # The engine's own looks in `weight.grad`, where fp16 gradients do not accumulate, and skips what is not there.
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {schedule.ReduceTiedGrads: _sum_tied_gradients}


def _repair_zero_norm(optimizer: DeepSpeedZeroOptimizer, context: ParallelContext, device: torch.device) -> None:
    """DeepSpeed sums over the ranks once for each parameter group, so that stages with different numbers of groups,
    such as those with norms and those without, wait for each other for ever. Here all groups are one sum."""

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        square = _local_norm(_zero_gradients(optimizer), context, device).square()
        distributed.all_reduce(square)
        return square.sqrt().float()

    optimizer.scaled_global_norm = scaled_global_norm


def _repair_bf16_norm(optimizer: BF16_Optimizer, context: ParallelContext, device: torch.device) -> None:
    """DeepSpeed fails on a rank that counts no gradient of its own. A list of this rank's norm alone has the norm of
    the list of all its gradients."""
    own = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return own(for_clipping=True)
        return [_local_norm(_bf16_gradients(optimizer), context, device)], {}

    optimizer.get_grads_for_norm = get_grads_for_norm


def _local_norm(
    gradients: Iterator[tuple[nn.Parameter, Tensor]], context: ParallelContext, device: torch.device
) -> Tensor:
    """This rank's part of the global norm, float64. Squares over all ranks add up to that of the whole gradient.

    What several ranks hold alike counts on one of them: replicated weights on tensor rank 0, the embedding of a tied
    head on the embedding's stage. The others add nothing, unless it is not finite: then no rank may take the step.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    for parameter, gradient in gradients:
        first = parameter_spec(parameter).shard_dim is not None or context.tensor_rank == 0
        counts = first and not getattr(parameter, PIPE_REPLICATED)
        for part in torch.split(gradient.flatten(), WIDENED_AT_ONCE):
            square += float(counts) * torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return square.sqrt()


def _zero_gradients(optimizer: DeepSpeedZeroOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of this data-parallel rank's partition with the part of its gradient that lies in there."""
    for group, parameters in enumerate(optimizer.params_in_partition):
        gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        # What the last partitions have beyond their parameters is padding that is not marked as such.
        yield from zip(parameters, gradients[: len(parameters)], strict=True)


def _bf16_gradients(optimizer: BF16_Optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    groups = zip(
        optimizer.bf16_groups, optimizer.fp32_groups_has_gradients, optimizer.fp32_groups_gradients, strict=True
    )
    for parameters, present, gradients in groups:
        for parameter, there, gradient in zip(parameters, present, gradients, strict=True):
            if there:
                yield parameter, gradient


def _sum_tied_gradients(engine: PipelineEngine) -> None:
    for weight, group in engine.module.get_tied_weights_and_groups():
        distributed.all_reduce(engine.optimizer.get_gradient_for_reduction(weight), group=group)
