"""Everything that this project changes in DeepSpeed 0.19.8, in one place and in order.

1. `join_process_group`, before the engine is made: quiet logs, no shared-memory collective, which needs a compiler, and
   torch's own names of collectives.
2. `model/pipeline.py` subclasses PipelineModule, of which the engine is made: partition, recomputation, tied weights.
3. `trust_optimizer`, before the engine is made, for optimizers that DeepSpeed does not know.
4. `install` changes the engine that `deepspeed.initialize` has made. How gradients and weights travel in place of
   DeepSpeed's way, and why, is said in `training/gradients/` (reduction.py, weight_gathering.py). Nothing else sets an
   attribute of it afterwards, except while a checkpoint loads: `checkpointing/engine/load_universal.py` replaces the
   loader of the universal form, which unpickles freely, and `hyperparameters.py` puts the configured hyperparameters
   back; and while somebody looks at the parts of its steps (`training/step_parts.py`).

Tested in tests/ranks/training: gradients/ (what is sent, and when), test_agreement.py (norms, tied gradients; each case
fails or waits for ever without its patch), test_deepspeed_patches.py (no compiler, no scripts, no warnings); in
tests/faults/training/test_non_finite.py (guard) and tests/unit/checkpointing/test_safe_load.py (files of checkpoints).
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, distributed

from megatron.checkpointing.engine.engine_files import build_engine_files
from megatron.checkpointing.engine.flat_partitions import grouped_fragments
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.mpu.collectives import ALL_GATHER, REDUCE_SCATTER
from megatron.mpu.context import ParallelContext
from megatron.training.after_growth import AfterGrowth
from megatron.training.gradients.reduction import GradientReduction
from megatron.training.gradients.slice_norm import SliceNorm
from megatron.training.gradients.weight_gathering import WeightGathering
from megatron.training.stability.step_guard import StepGuard

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


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
    parallel: ParallelConfig,
    checkpoint: CheckpointConfig,
    guard: StepGuard,
    after_growth: AfterGrowth,
) -> WeightGathering:
    """Patches the engine: the gradients of a step in the order in which it meets them, its weights, then its files.

    Returns what knows the weights that are still on their way after a step.
    """
    reduction = GradientReduction(engine, context, parallel.zero.reduce_bucket_size, parallel.communication_data_type)
    norm = SliceNorm(grouped_fragments(engine.optimizer), context)
    _reduce_in_backward(engine, reduction, guard, after_growth)

    if isinstance(engine.optimizer, BF16_Optimizer):
        _patch_bf16_norm(engine.optimizer, reduction, norm, guard, context)
    else:
        _patch_zero_norm(engine.optimizer, reduction, norm, guard)
    # Files are flushed and hashed while written, copied first where saves are asynchronous, and never unpickled freely.
    engine.checkpoint_engine = build_engine_files(checkpoint)
    # DeepSpeed would put scripts into every checkpoint which unpickle whatever they find there.
    engine._copy_recovery_script = lambda save_path: None
    return WeightGathering(engine, reduction, context)


def _reduce_in_backward(
    engine: PipelineEngine, reduction: GradientReduction, guard: StepGuard, after_growth: AfterGrowth
) -> None:
    """Sums gradients as `reduction` does. The guard sees each rank's own, before any sum is used.

    Gradients of rows that a growth has frozen are dropped before they count in any norm.
    """
    run_backward = engine._INSTRUCTION_MAP[schedule.BackwardPass]

    def backward(engine: PipelineEngine, buffer_id: int) -> None:
        reduction.begin_backward()
        run_backward(engine, buffer_id)

    def inspect_and_sum_tied(engine: PipelineEngine) -> None:
        guard.inspect(reduction.end_backward())
        reduction.sum_tied()

    def finish(engine: PipelineEngine) -> None:
        reduction.finish()
        after_growth.drop_frozen_gradients(reduction.slices)
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
            # As the optimizer takes gradients that somebody else has laid out.
            for group, mean in enumerate(reduction.slices):
                engine.optimizer.averaged_gradients[group] = GradPartitionBufferGroup([mean], mean)

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {
        schedule.BackwardPass: backward,
        schedule.ReduceTiedGrads: inspect_and_sum_tied,
        schedule.ReduceGrads: finish,
    }


def _patch_zero_norm(
    optimizer: DeepSpeedZeroOptimizer, reduction: GradientReduction, norm: SliceNorm, guard: StepGuard
) -> None:
    """Sums the squares of all parameter groups over the ranks at once.

    DeepSpeed sums once for each group, so that stages with different numbers of groups, such as those with norms and
    those without, wait for each other for ever. It leaves a step out whose norm is not finite, so it need not look for
    an overflow before.
    """

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        square = guard.judged(norm.square(reduction.slices))
        distributed.all_reduce(square)
        return square.sqrt().float()

    optimizer.scaled_global_norm = scaled_global_norm
    optimizer.check_overflow = lambda partition_gradients=True: None


def _patch_bf16_norm(
    optimizer: BF16_Optimizer,
    reduction: GradientReduction,
    norm: SliceNorm,
    guard: StepGuard,
    context: ParallelContext,
) -> None:
    """Hands the norm over this rank's data-parallel peers to DeepSpeed as a list of one, which sums over the others.

    It would take the norm of a list of whole gradients, and fails on a rank that counts no gradient of its own.
    """

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        if for_clipping:
            return reduction.slices
        square = guard.judged(norm.square(reduction.slices))
        if context.data_group is not None:
            distributed.all_reduce(square, group=context.data_group)
        return [square.sqrt()], {}

    optimizer.get_grads_for_norm = get_grads_for_norm
