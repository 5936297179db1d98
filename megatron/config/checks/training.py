"""Checks of the section `training`: batches, samples, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.batch_triangle import NEITHER_GIVEN
from megatron.config.checks.finding import Check, Finding, nearest_multiple
from megatron.config.optimizer import facts_of
from megatron.config.sections.run_config import RunConfig


def _batch_is_given(run: RunConfig) -> Iterator[Finding]:
    training = run.training
    if training.train_batch_size is None and training.train_micro_batch_size_per_gpu is None:
        path = "train_batch_size" if training.gradient_accumulation_steps is None else "gradient_accumulation_steps"
        yield Finding(f"training.{path}", NEITHER_GIVEN)


def _batch_divides(run: RunConfig) -> Iterator[Finding]:
    """Requires a global batch that is a multiple of what one rank contributes, whatever the number of ranks."""
    training = run.training
    total = training.train_batch_size
    micro, steps = training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps
    share = (micro or 1) * (steps or 1)
    if total is not None and total % share:
        given = [f"micro batch {micro}"] * (micro is not None) + [f"accumulation {steps}"] * (steps is not None)
        yield Finding(
            "training.train_batch_size",
            f"is not a multiple of {' x '.join(given)}; nearest valid value: {nearest_multiple(total, share)}",
        )


_MOST_SAMPLES = 10**11
"""Samples of a run whose order is made: several hundred times what the published runs read."""


def _batch_keys(run: RunConfig) -> str:
    if run.training.train_batch_size is not None:
        return "train_batch_size"
    return "train_micro_batch_size_per_gpu x gradient_accumulation_steps"


def _samples_are_countable(run: RunConfig) -> Iterator[Finding]:
    """Refuses runs whose index of samples no machine holds; `sample_counts` in megatron/data has the same numbers."""
    training = run.training
    micro, steps = training.train_micro_batch_size_per_gpu, training.gradient_accumulation_steps
    batch = training.train_batch_size or (micro or 1) * (steps or 1)
    validations = training.train_iters // training.eval_interval + 1
    for path, what, batches in (
        ("train_iters", "training", training.train_iters),
        ("eval_iters", "validation", validations * training.eval_iters),
    ):
        if batches * batch > _MOST_SAMPLES:
            yield Finding(
                f"training.{path}",
                f"{what} would read {batches * batch:,} samples in batches of {batch} ({_batch_keys(run)}); at most "
                f"{_MOST_SAMPLES:,} are put in order",
            )


def _optimizer_values(run: RunConfig) -> Iterator[Finding]:
    section = run.training.optimizer
    for name, message in facts_of(section).check(section):
        yield Finding(f"training.optimizer.{name}", message)


def _smallest_learning_rate(run: RunConfig) -> Iterator[Finding]:
    lowest, peak = run.training.lr_schedule.min_lr, run.training.optimizer.lr
    if lowest > peak:
        yield Finding("training.lr_schedule.min_lr", f"is above optimizer.params.lr {peak:g}, the peak learning rate")


def _one_schedule(run: RunConfig) -> Iterator[Finding]:
    schedule = run.training.lr_schedule
    if schedule.override_lr_scheduler and schedule.use_checkpoint_lr_scheduler:
        yield Finding(
            "training.lr_schedule.override_lr_scheduler", "contradicts use_checkpoint_lr_scheduler: true; keep one"
        )


def _wsd_schedule(run: RunConfig) -> Iterator[Finding]:
    schedule = run.training.lr_schedule
    path, steps = "training.lr_schedule.wsd_decay_iters", schedule.wsd_decay_iters
    if schedule.style == "WSD" and steps is None:
        yield Finding("training.lr_schedule.style", "needs lr_wsd_decay_iters: the steps of its decay")
    if schedule.style != "WSD" and steps is not None:
        yield Finding(path, f"belongs to lr_decay_style: WSD, and this is {schedule.style}")
    key = "train_iters" if schedule.decay_iters is None else "lr_decay_iters"
    longest = schedule.decay_iters or run.training.train_iters
    if schedule.style == "WSD" and steps is not None and steps > longest:
        yield Finding(path, f"is above {key} {longest}, whose last steps they are")


CHECKS: tuple[Check, ...] = (
    _batch_is_given,
    _batch_divides,
    _samples_are_countable,
    _optimizer_values,
    _smallest_learning_rate,
    _one_schedule,
    _wsd_schedule,
)
