"""The batch triangle: every way to give it, and every way to get it wrong."""

import pytest

from megatron.config.batch_triangle import data_parallel_size, equation, resolve_batch
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import TrainingConfig
from megatron.errors import ConfigError


def training(total: int | None, micro: int | None, steps: int | None) -> TrainingConfig:
    return TrainingConfig(
        train_iters=1,
        optimizer=AdamWConfig(lr=1e-3),
        train_batch_size=total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=steps,
    )


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "expected"),
    [
        (1024, 32, 4, 8, (32, 4)),
        (1024, 32, None, 8, (32, 4)),
        (1024, None, 4, 8, (32, 4)),
        (None, 32, 4, 8, (32, 4)),
        (1024, None, None, 8, (128, 1)),
        (None, 32, None, 8, (32, 1)),
        (7, None, None, 7, (1, 1)),
    ],
)
def test_missing_sides_are_derived(
    total: int | None, micro: int | None, steps: int | None, ranks: int, expected: tuple[int, int]
) -> None:
    batch = resolve_batch(training(total, micro, steps), ranks, {})
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps) == expected
    assert batch.data_parallel_size == ranks
    assert total is None or batch.global_batch_size == total


@pytest.mark.parametrize(
    ("total", "micro", "steps", "ranks", "message"),
    [
        (1024, 32, 4, 16, "micro batch 32 x accumulation 4 x 16 data-parallel ranks = 2048, not train_batch_size 1024"),
        (1024, 32, None, 24, r"x accumulation \? x 24 .* no whole solution .* nearest valid size is 768"),
        (1024, None, None, 3, r"micro batch \? x accumulation \? x 3 .* nearest valid size is 1023"),
        (16, None, None, 32, "nearest valid size is 32"),
        (16, 8, None, 4, "nearest valid size is 32; this one takes train_micro_batch_size_per_gpu 4"),
        (1024, 32, None, 128, "this one takes train_micro_batch_size_per_gpu 8"),
        (24, 7, None, 2, "this one takes train_micro_batch_size_per_gpu 6"),
        (None, None, 4, 2, "train_batch_size or train_micro_batch_size_per_gpu must be given"),
    ],
)
def test_contradictions(total: int | None, micro: int | None, steps: int | None, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_batch(training(total, micro, steps), ranks, {})


@pytest.mark.parametrize(("ranks", "tensor", "pipe", "data"), [(1, 1, 1, 1), (8, 2, 2, 2), (12, 3, 1, 4)])
def test_data_parallel_ranks(ranks: int, tensor: int, pipe: int, data: int) -> None:
    assert data_parallel_size(ParallelConfig(model_parallel_size=tensor, pipe_parallel_size=pipe), ranks) == data


def test_ranks_that_do_not_divide() -> None:
    with pytest.raises(
        ConfigError, match=r"10 ranks do not divide .* 2 x 2 = 4\. Start a multiple of 4 ranks, such as 8"
    ):
        data_parallel_size(ParallelConfig(model_parallel_size=2, pipe_parallel_size=2), 10)


def test_equation() -> None:
    assert equation(resolve_batch(training(1024, 32, None), 8, {}), 2048) == (
        "micro batch 32 x accumulation 4 x 8 data-parallel ranks = 1,024 samples = 2,097,152 tokens per step"
    )
