"""Builds DeepSpeed's pipeline engine, the one engine in which models are trained."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.model_size import training_flops
from megatron.config.sections.elastic import ElasticConfig
from megatron.config.sections.growth import GrowthRecord
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.errors import EnvironmentSetupError
from megatron.model.causal_lm import VocabSize
from megatron.model.loss import CausalLMLoss, FusedCausalLMLoss
from megatron.model.pipeline import build_pipeline
from megatron.model.speedups import Speedups, apply_speedups, choose_speedups
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import local_device
from megatron.training.after_growth import AfterGrowth
from megatron.training.distillation.distillation import Distillation
from megatron.training.distillation.find_teacher import Teacher
from megatron.training.distillation.teacher_stage import TeacherStage
from megatron.training.elastic.elastic_training import CrossEntropy, ElasticTraining, TwoPassLoss
from megatron.training.gradients.weight_gathering import WeightGathering
from megatron.training.lr_scheduler import LRScheduler
from megatron.training.optimizer import build_optimizer, give_partitions
from megatron.training.stability.deepspeed_patches import install, trust_optimizer
from megatron.training.stability.step_guard import StepGuard
from megatron.training.stop_request import StopRequest

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


def require_hardware(config: RunConfig) -> Speedups:
    """Returns the speed-ups to use on this machine.

    Raises EnvironmentSetupError when it cannot compute in the configured number format, or lacks a speed-up that is on.
    """
    on_gpu = torch.cuda.is_available()
    if config.training.precision.dtype == "fp16" and not on_gpu:
        raise EnvironmentSetupError(
            "fp16 needs a GPU, and torch sees none. On a CPU use `precision: bfloat16` or `precision: fp32` in place "
            "of the `fp16` block."
        )
    tokens = config.model.param_tokens
    return choose_speedups(
        config.speedups,
        config.training.precision,
        config.training.optimizer,
        on_gpu=on_gpu,
        theta=None if tokens is None else tokens.theta,
    )


@dataclass(frozen=True)
class BuiltEngine:
    """An engine with what goes along with its steps."""

    engine: PipelineEngine
    guard: StepGuard
    after_growth: AfterGrowth
    weights: WeightGathering
    distillation: Distillation | None = None
    elastic: ElasticTraining | None = None


def build_engine(
    config: RunConfig,
    batch: BatchConfig,
    vocab: VocabSize,
    context: ParallelContext,
    stop: StopRequest,
    growth: GrowthRecord | None = None,
    teacher: Teacher | None = None,
) -> BuiltEngine:
    """Builds model, optimizer and schedule in DeepSpeed's pipeline engine, and what goes along with its steps.

    `growth` is the last one of the run, whose rules hold; `teacher` the one that it is distilled from. Collective.
    Raises what `require_hardware`, `build_pipeline` and `TeacherStage` raise.
    """
    import deepspeed

    speedups, elastic = require_hardware(config), config.elastic
    if teacher is not None or (elastic is not None and elastic.distillation_weight):
        # the divergence from another model is one of whole logits
        speedups = replace(speedups, fused_cross_entropy=False)
    logger.info("speed-ups: %s", speedups)
    for line in speedups.missed:
        logger.info(line)
    distillation = None if teacher is None else _load_teacher(teacher, config, batch, vocab, speedups, context)
    two_pass_loss = None
    if elastic is not None and elastic.passes > 1:
        two_pass_loss = _two_pass_loss(elastic, config, batch, vocab, speedups, context)
        batch = batch.model_copy(
            update={"gradient_accumulation_steps": elastic.passes * batch.gradient_accumulation_steps}
        )
    # PipelineModule and its engine print to standard output what only their authors need.
    with contextlib.redirect_stdout(io.StringIO()):
        module = build_pipeline(
            config.model,
            vocab,
            config.parallel,
            context,
            seed=config.training.seed,
            checkpointed=config.training.checkpoint_activations,
            fused_cross_entropy=speedups.fused_cross_entropy,
            loss=two_pass_loss if distillation is None else distillation.loss,
        )
        apply_speedups(module, speedups)
        optimizer = build_optimizer(module, config.training.optimizer, speedups.optimizer)
        trust_optimizer(optimizer)
        scheduler = LRScheduler(
            optimizer,
            peak=config.training.optimizer.lr,
            schedule=config.training.lr_schedule,
            train_iters=config.training.train_iters,
        )
        engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=scheduler, config=deepspeed_config(config, batch)
        )
    give_partitions(optimizer, engine.optimizer, context)
    passes = 1 if elastic is None else elastic.passes
    guard = StepGuard(engine, context, config.training.precision, stop, passes)
    after_growth = AfterGrowth(engine, growth, config.training.optimizer, context)
    weights = install(engine, context, config.parallel, config.checkpoint, guard, after_growth)
    training = None
    if elastic is not None:
        flops = training_flops(config.model, vocab.padded, config.model.seq_length)
        training = ElasticTraining(elastic, config.model, config.training.seed, module, two_pass_loss, flops, context)
    return BuiltEngine(engine, guard, after_growth, weights, distillation, training)


def _two_pass_loss(
    elastic: ElasticConfig,
    config: RunConfig,
    batch: BatchConfig,
    vocab: VocabSize,
    speedups: Speedups,
    context: ParallelContext,
) -> TwoPassLoss:
    num_valid = vocab.num_valid(config.model)
    fused = speedups.fused_cross_entropy
    cross_entropy: CrossEntropy = FusedCausalLMLoss(num_valid, context) if fused else CausalLMLoss(num_valid, context)
    accumulation = batch.gradient_accumulation_steps
    return TwoPassLoss(elastic, cross_entropy, vocab.actual, accumulation, local_device(), context)


def _load_teacher(
    teacher: Teacher,
    config: RunConfig,
    batch: BatchConfig,
    vocab: VocabSize,
    speedups: Speedups,
    context: ParallelContext,
) -> Distillation | None:
    """Loads the run's teacher on this rank, and makes the loss of both."""
    if config.distillation is None:
        return None
    logger.info("%s", teacher.summary(config))
    precision, device = config.training.precision, local_device()
    stage = TeacherStage(teacher, config.parallel, precision, speedups, context, device, batch.micro_batch_size)
    num_valid, accumulation = vocab.num_valid(config.model), batch.gradient_accumulation_steps
    return Distillation(config.distillation, stage, num_valid, vocab.actual, accumulation, context)


def release_engine(engine: PipelineEngine) -> None:
    """Lets an engine go that takes no more steps; its memory is free once nothing else refers to it.

    It keeps the graph of its last losses, which refers to it through hooks that Python's collector does not see.
    """
    engine.destroy()
    engine.loss = engine.total_loss = None
    for buffers in engine.pipe_buffers.values():
        buffers.clear()
