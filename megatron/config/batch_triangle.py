"""The batch triangle: micro batch x accumulation x data-parallel ranks = global batch."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import BatchConfig, TrainingConfig
from megatron.config.yaml.problems import DEFAULT, Origin
from megatron.errors import ConfigError

_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Counts the ranks that see different samples.

    Raises ConfigError when the other parallel sizes do not divide the ranks.
    """
    model_ranks = parallel.model_parallel_size * parallel.pipe_parallel_size
    if world_size % model_ranks:
        raise ConfigError(
            f"{world_size} ranks do not divide into groups of model_parallel_size x pipe_parallel_size = "
            f"{parallel.model_parallel_size} x {parallel.pipe_parallel_size} = {model_ranks}. Start a multiple of "
            f"{model_ranks} ranks, such as {max(world_size // model_ranks, 1) * model_ranks}, or change the sizes."
        )
    return world_size // model_ranks


def resolve_batch(training: TrainingConfig, ranks: int, origins: Mapping[str, Origin]) -> BatchConfig:
    """Derives the missing sides of the triangle for `ranks` data-parallel ranks, as NeoX does.

    Without gradient_accumulation_steps, accumulation is 1 unless train_batch_size and the micro batch ask for more.
    Raises ConfigError, with the equation, when the given sides do not fit the ranks.
    """
    total = training.train_batch_size
    micro = training.train_micro_batch_size_per_gpu
    steps = training.gradient_accumulation_steps
    if total is None:
        if micro is None:
            raise ConfigError(NEITHER_GIVEN)
        return BatchConfig(micro_batch_size=micro, gradient_accumulation_steps=steps or 1, data_parallel_size=ranks)
    if micro is None:
        micro = total // ((steps or 1) * ranks)
        steps = steps or 1
    elif steps is None:
        steps = total // (micro * ranks)
    if micro < 1 or steps < 1 or micro * steps * ranks != total:
        raise ConfigError(_mismatch(training, ranks, origins))
    return BatchConfig(micro_batch_size=micro, gradient_accumulation_steps=steps, data_parallel_size=ranks)


NEITHER_GIVEN = "train_batch_size or train_micro_batch_size_per_gpu must be given"


def implied_data_parallel_size(training: TrainingConfig) -> int | None:
    """Returns the data-parallel ranks that all three sides of the triangle fix together; None when one is missing."""
    sides = [getattr(training, key) for key in _KEYS]
    if None in sides:
        return None
    total, micro, steps = sides
    return int(total // (micro * steps))


def equation(batch: BatchConfig, seq_length: int) -> str:
    """Puts the batch in words: samples and tokens per optimizer step."""
    return (
        f"micro batch {batch.micro_batch_size} x accumulation {batch.gradient_accumulation_steps} x "
        f"{batch.data_parallel_size} data-parallel ranks = {batch.global_batch_size:,} samples = "
        f"{batch.global_batch_size * seq_length:,} tokens per step"
    )


def _mismatch(training: TrainingConfig, ranks: int, origins: Mapping[str, Origin]) -> str:
    total, micro, steps = (getattr(training, key) for key in _KEYS)
    product = (micro or 1) * (steps or 1) * ranks
    nearest = max(round(total / product), 1) * product
    places = ", ".join(
        f"{key} from {origins.get(f'training.{key}', DEFAULT)}" for key in _KEYS if getattr(training, key) is not None
    )
    left = f"micro batch {micro or '?'} x accumulation {steps or '?'} x {ranks} data-parallel ranks"
    if micro is not None and steps is not None:
        return f"{left} = {product}, not train_batch_size {total} ({places}). Leave one of the three out."
    smaller = _smaller_micro_batch(total, micro, ranks) if steps is None else ""
    return (
        f"{left} = train_batch_size {total} has no whole solution ({places}). The nearest valid size is {nearest}"
        f"{smaller}."
    )


def _smaller_micro_batch(total: int, micro: int | None, ranks: int) -> str:
    if micro is None or total % ranks:
        return ""
    largest = next(size for size in range(min(micro, total // ranks), 0, -1) if total // ranks % size == 0)
    return f"; this one takes train_micro_batch_size_per_gpu {largest}"
