"""Judges a step whose losses or gradients are NaN or infinite: the run stops, leaves it out, or rolls back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from torch import distributed

from megatron.config.sections.training import BatchConfig, NonFiniteConfig
from megatron.errors import NonFiniteError
from megatron.training.progress import Progress
from megatron.training.stability.step_guard import Evidence, StepGuard

logger = logging.getLogger(__name__)


def must_roll_back(guard: StepGuard, progress: Progress, config: NonFiniteConfig, batch: BatchConfig) -> bool:
    """Tells whether the run must go back to its last checkpoint after the step that `progress` has just counted.

    The same on every rank. Without a rollback the run goes on, also past a step that was left out. Counts bad steps in
    `progress`. Raises NonFiniteError where the policy is to stop, the budget is used up, or fp16 finds no scale.
    """
    if guard.scale_is_stuck:
        raise NonFiniteError(
            f"step {progress.iteration}: fp16 gradients overflow although the loss scale is at its smallest. Train in "
            "`precision: bfloat16`, lower the learning rate, or lower `fp16.min_loss_scale`."
        )
    if not guard.step_was_bad:
        return False
    progress.non_finite_steps += 1
    first_sample = progress.consumed_train_samples - batch.global_batch_size
    report = describe(guard.evidence, progress.iteration, first_sample, batch)
    if config.policy == "stop":
        raise NonFiniteError(
            f"{report} No weight was changed by this step, and the last checkpoint stays the last. Look at the samples "
            "(tools/datasets/batch_viewer.py), lower the learning rate, or set `non_finite_policy` to skip or rollback."
        )
    if progress.non_finite_steps > config.budget:
        raise NonFiniteError(
            f"{report} It is number {progress.non_finite_steps} of this run, and `non_finite_budget` allows "
            f"{config.budget}. Look for the reason, or raise the budget."
        )
    if distributed.get_rank() == 0:
        action = "rolling back to the last checkpoint" if config.policy == "rollback" else "left out"
        logger.warning("%s %d of %d: %s", report, progress.non_finite_steps, config.budget, action)
    return config.policy == "rollback"


def describe(evidence: Sequence[Evidence], iteration: int, first_sample: int, batch: BatchConfig) -> str:
    """Names step, ranks and training samples, counted from 0 in the order of consumption, in sentences."""
    if not evidence:
        return f"step {iteration}: every rank's gradients are finite, but their sum or its norm is not."
    return f"step {iteration}: " + " ".join(_sentences(evidence, first_sample, batch))


def _sentences(evidence: Sequence[Evidence], first_sample: int, batch: BatchConfig) -> Iterator[str]:
    for data_rank in sorted({seen.data_rank for seen in evidence}):
        own = [seen for seen in evidence if seen.data_rank == data_rank]
        ranks = ", ".join(str(seen.rank) for seen in own)
        bad_losses = sorted({number for seen in own for number in seen.bad_losses})
        what = "loss" if bad_losses else "gradient"
        suspects = bad_losses or range(batch.gradient_accumulation_steps)
        samples = ", ".join(_samples(number, data_rank, first_sample, batch) for number in suspects)
        yield f"NaN or infinity in the {what} on rank {ranks}, from training samples {samples}."


def _samples(micro_batch: int, data_rank: int, first_sample: int, batch: BatchConfig) -> str:
    size = batch.micro_batch_size
    first = first_sample + (micro_batch * batch.data_parallel_size + data_rank) * size
    return f"{first}-{first + size - 1}"
