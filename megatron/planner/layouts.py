"""Layouts of a run on the same ranks with the same global batch, those that fit first and the fastest of them first."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checks.layout import fits_together, parallel_sizes
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.errors import ConfigError
from megatron.planner.implementation import implementation_of
from megatron.planner.plan import Plan, make_plan
from megatron.planner.target import Target

MOST_STAGES = 32
"""Pipeline stages of the layouts that are tried."""


def layouts(
    run: RunConfig, global_batch_size: int, world_size: int, padded_vocab_size: int, target: Target
) -> list[Plan]:
    """Plans every layout that the configuration can have, those that fit first, sorted by predicted time.

    Tensor-parallel ranks stay within a machine. Micro batches are powers of two. Activations are kept, or scores or
    whole layers computed again.
    """
    plans = []
    implementation = implementation_of(run, on_gpu=target.on_gpu)
    for candidate in _parallel(run, world_size, padded_vocab_size, target):
        sizes = candidate.parallel
        data = world_size // (sizes.model_parallel_size * sizes.pipe_parallel_size)
        if global_batch_size % data:
            continue
        for micro in _micro_batches(global_batch_size // data, run.training.train_micro_batch_size_per_gpu):
            batch = BatchConfig(
                micro_batch_size=micro,
                gradient_accumulation_steps=global_batch_size // data // micro,
                data_parallel_size=data,
            )
            for recomputed in _recomputed(candidate):
                try:
                    plans.append(make_plan(recomputed, batch, world_size, padded_vocab_size, target, implementation))
                except ConfigError:  # a stage without parameters
                    continue
    return sorted(plans, key=lambda plan: (not plan.fits, plan.step.total, plan.largest.peak))


def layout_keys(plan: Plan) -> dict[str, object]:
    """Returns the keys of a YAML that make a plan's layout."""
    sizes, again = plan.run.parallel, plan.run.training.checkpoint_activations
    keys: dict[str, object] = {
        "model_parallel_size": sizes.model_parallel_size,
        "pipe_parallel_size": sizes.pipe_parallel_size,
        "sequence_parallel": sizes.sequence_parallel,
        "train_batch_size": plan.batch.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.batch.micro_batch_size,
        "gradient_accumulation_steps": plan.batch.gradient_accumulation_steps,
        "checkpoint_activations": again.enabled,
    }
    return keys | {"recompute_scores": again.scores} if plan.run.model.param_tokens is not None else keys


def _parallel(run: RunConfig, world_size: int, padded_vocab_size: int, target: Target) -> Iterator[RunConfig]:
    """Yields the configuration with each pair of tensor-parallel size and pipeline stages that it can have."""
    model = run.model.model_copy(update={"padded_vocab_size": padded_vocab_size})
    plain = run.model_copy(update={"model": model, "parallel": _with_sizes(run, 1, 1, sequence_parallel=False)})
    for tensor, stages in parallel_sizes(plain, world_size):
        if tensor > target.per_machine or stages > MOST_STAGES:
            continue
        for sequence_parallel in (False, True) if tensor > 1 else (False,):
            parallel = _with_sizes(run, tensor, stages, sequence_parallel=sequence_parallel)
            candidate = run.model_copy(update={"parallel": parallel, "model": model})
            if fits_together(candidate):
                yield candidate


def _with_sizes(run: RunConfig, tensor: int, stages: int, *, sequence_parallel: bool) -> ParallelConfig:
    sizes = {"model_parallel_size": tensor, "pipe_parallel_size": stages, "sequence_parallel": sequence_parallel}
    return run.parallel.model_copy(update=sizes)


def _micro_batches(samples: int, configured: int | None) -> list[int]:
    """Returns sizes of micro batches into which a rank's samples divide."""
    sizes = {2**power for power in range(11)} | ({configured} if configured else set())
    return sorted(size for size in sizes if samples % size == 0)


def _recomputed(run: RunConfig) -> Iterator[RunConfig]:
    """Yields the configuration with each choice of what the backward pass computes again."""
    choices = [{"enabled": False, "scores": False}, {"enabled": True, "scores": False}]
    if run.model.param_tokens is not None and run.speedups.pattention != "reference":
        choices.insert(1, {"enabled": False, "scores": True})
    for choice in choices:
        again = run.training.checkpoint_activations.model_copy(update=choice)
        training = run.training.model_copy(update={"checkpoint_activations": again})
        yield run.model_copy(update={"training": training})
