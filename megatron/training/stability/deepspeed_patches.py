"""Everything that this project changes in DeepSpeed 0.19.8, in one place and in order.

1. `join_process_group`, before the engine is made: quiet logs, no shared-memory collective, which needs a compiler, and
   torch's own names of collectives.
2. `model/pipeline.py` subclasses PipelineModule, of which the engine is made: partition, recomputation, tied weights.
3. `trust_optimizer`, before the engine is made, for optimizers that DeepSpeed does not know.
4. `install` changes the engine that `deepspeed.initialize` has made. Nothing else sets an attribute of it afterwards,
   except while a checkpoint loads: `checkpointing/engine/load_universal.py` replaces the loader of the universal form,
   which unpickles freely, and `hyperparameters.py` puts the configured hyperparameters back; and while somebody looks
   at the parts of its steps (`training/step_parts.py`).

Tested in tests/ranks/training: test_agreement.py (norms, tied gradients; each case fails or waits for ever without its
patch), test_deepspeed_patches.py (no compiler, no scripts, no warnings); in tests/faults/training/test_non_finite.py
(guard) and tests/unit/checkpointing/test_safe_load.py (files of checkpoints).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, distributed, nn

from megatron.checkpointing.engine.engine_files import build_engine_files
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.mpu.collectives import ALL_GATHER, REDUCE_SCATTER
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec
from megatron.training.after_growth import AfterGrowth
from megatron.training.stability.step_guard import StepGuard

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

WIDENED_AT_ONCE = 2**24
"""Gradient elements of which a float64 copy is made at a time."""


def join_process_group() -> None:
    """Lets DeepSpeed communicate through the default process group, which must exist."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed compiles a shared-memory collective for CPU ranks while it starts. gloo does the same work without
    # a compiler, and a user's first run should not need one.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend=distributed.get_backend(), verbose=False)
    # DeepSpeed calls two collectives by names that torch has given up, and warns about on every rank.
    backend = sys.modules["deepspeed.comm.comm"].cdb
    backend.all_gather_function = getattr(distributed, ALL_GATHER)
    backend.reduce_scatter_function = getattr(distributed, REDUCE_SCATTER)


def trust_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Puts an optimizer's class on DeepSpeed's list of those that ZeRO may step, without which it warns of each run.

    This project's tests hold every registered optimizer, under ZeRO-1 and in all layouts, against plain torch.
    """
    if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(type(optimizer))


def install(
    engine: PipelineEngine,
    context: ParallelContext,
    checkpoint: CheckpointConfig,
    guard: StepGuard,
    after_growth: AfterGrowth,
) -> None:
    """Patches the engine: the gradients of a step in the order in which it meets them, then its files."""
    _guard_and_sum_tied_gradients(engine, guard, after_growth)
    if isinstance(engine.optimizer, BF16_Optimizer):
        _patch_bf16_norm(engine.optimizer, context, engine.device)
    else:
        _patch_zero_norm(engine.optimizer, context, engine.device)
    # Files are flushed and hashed while written, copied first where saves are asynchronous, and never unpickled freely.
    engine.checkpoint_engine = build_engine_files(checkpoint)
    # DeepSpeed would put scripts into every checkpoint which unpickle whatever they find there.
    engine._copy_recovery_script = lambda save_path: None


def _guard_and_sum_tied_gradients(engine: PipelineEngine, guard: StepGuard, after_growth: AfterGrowth) -> None:
    """Lets the guard see each rank's own gradients, before the first sum over ranks, which is that of tied weights.

    Those of rows that a growth has frozen are dropped then. DeepSpeed's own sum looks in `weight.grad`, where fp16
    gradients do not accumulate, and skips what is not there.
    """
    own_sum = engine._INSTRUCTION_MAP[schedule.ReduceTiedGrads]
    sum_tied = own_sum if isinstance(engine.optimizer, BF16_Optimizer) else _sum_tied_gradients

    def inspect_and_sum(engine: PipelineEngine) -> None:
        guard.inspect()
        after_growth.drop_frozen_gradients()
        sum_tied(engine)

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {schedule.ReduceTiedGrads: inspect_and_sum}


def _sum_tied_gradients(engine: PipelineEngine) -> None:
    for weight, group in engine.module.get_tied_weights_and_groups():
        distributed.all_reduce(engine.optimizer.get_gradient_for_reduction(weight), group=group)


def _patch_zero_norm(optimizer: DeepSpeedZeroOptimizer, context: ParallelContext, device: torch.device) -> None:
    """Sums the squares of all parameter groups over the ranks at once.

    DeepSpeed sums once for each group, so that stages with different numbers of groups, such as those with norms and
    those without, wait for each other for ever.
    """

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        square = _local_norm(_zero_gradients(optimizer), context, device).square()
        distributed.all_reduce(square)
        return square.sqrt().float()

    optimizer.scaled_global_norm = scaled_global_norm


def _patch_bf16_norm(optimizer: BF16_Optimizer, context: ParallelContext, device: torch.device) -> None:
    """Hands this rank's norm to DeepSpeed as a list of one, in place of the list of its gradients.

    The norm of both lists is the same, and DeepSpeed fails on a rank that counts no gradient of its own.
    """
    own = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return own(for_clipping=True)
        return [_local_norm(_bf16_gradients(optimizer), context, device)], {}

    optimizer.get_grads_for_norm = get_grads_for_norm


def _local_norm(
    gradients: Iterator[tuple[nn.Parameter, Tensor]], context: ParallelContext, device: torch.device
) -> Tensor:
    """Returns this rank's part of the global norm, float64: its squares over all ranks sum to the square of the norm.

    A gradient that several ranks hold alike counts on one of them: replicated weights on tensor rank 0, the embedding
    of a tied head on the embedding's stage. The others add 0, or NaN where it is not finite, so that no rank takes the
    step.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    for parameter, gradient in gradients:
        first = parameter_spec(parameter).shard_dim is not None or context.tensor_rank == 0
        counts = first and not getattr(parameter, PIPE_REPLICATED)
        for part in torch.split(gradient.flatten(), WIDENED_AT_ONCE):
            square += float(counts) * torch.linalg.vector_norm(part, dtype=torch.float64).square()
    return square.sqrt()


def _zero_gradients(optimizer: DeepSpeedZeroOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yields each parameter of this data-parallel rank's partition with the part of its gradient that lies in there."""
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
