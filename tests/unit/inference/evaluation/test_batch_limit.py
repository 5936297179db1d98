"""Batches of evaluation: their sizes, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from megatron.errors import EnvironmentSetupError
from megatron.inference.evaluation.harness.batch_limit import (
    CPU_TOKENS,
    BatchLimit,
    compute_in_batches,
    tokens_that_fit,
)
from megatron.loaded_model.loaded_model import LoadedModel
from megatron.model.causal_lm import build_local
from megatron.mpu.context import ParallelContext
from tests.helpers.checkpoints import CONFIG
from tests.helpers.models import VOCAB

LENGTHS = [100, 90, 80, 70, 60, 50, 40, 30, 20, 10]


def negated(limit: BatchLimit, fits: int, message: str = "") -> tuple[list[int], list[int]]:
    """The negated LENGTHS, computed where no more than `fits` padded tokens fit into memory; and the batches tried."""
    tried: list[int] = []

    def compute(batch: Sequence[int]) -> list[int]:
        tried.append(len(batch))
        if len(batch) * batch[0] > fits:
            raise RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory.")
        return [-length for length in batch]

    return compute_in_batches(LENGTHS, lambda length: length, limit, compute), tried


@pytest.mark.parametrize(("size", "batches"), [(1, [1] * 10), (4, [4, 4, 2]), (100, [10])])
def test_fixed_sizes(size: int, batches: list[int]) -> None:
    assert negated(BatchLimit(size), 10_000) == ([-length for length in LENGTHS], batches)


def test_automatic_batches_hold_as_many_tokens_as_fit() -> None:
    answers, batches = negated(BatchLimit("auto", tokens=200), 10_000)
    assert answers == [-length for length in LENGTHS]
    assert batches == [2, 2, 3, 3]
    assert BatchLimit("auto").sequences(16) == CPU_TOKENS // 16


@pytest.mark.parametrize("message", ["", "[enforce fail] . DefaultCPUAllocator: can't allocate memory"])
def test_automatic_batches_go_down_when_memory_runs_out(message: str, caplog: pytest.LogCaptureFixture) -> None:
    limit = BatchLimit("auto", tokens=1000)
    answers, batches = negated(limit, 250, message)
    assert answers == [-length for length in LENGTHS]
    assert batches[:3] == [10, 5, 2]
    assert limit.sequences(100) == 2
    assert "out of memory with 10 sequences of 100 tokens" in caplog.text


def test_a_sequence_that_does_not_fit_at_all() -> None:
    with pytest.raises(EnvironmentSetupError, match=r"with 1 sequences of 100 tokens\. Use more tensor-parallel"):
        negated(BatchLimit("auto", tokens=1000), 50)


@pytest.mark.parametrize(("size", "together"), [(8, False), ("auto", True)])
def test_what_cannot_be_made_smaller_ends(size: int, together: bool) -> None:
    """Other tensor-parallel ranks would wait for the one that tries again."""
    with pytest.raises(EnvironmentSetupError, match=f"eval_batch_size={size}: out of memory"):
        negated(BatchLimit(size, tokens=1000, together=together), 250)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        negated(BatchLimit("auto", tokens=1000), 250, "mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures the memory of a CUDA device")
def test_the_memory_of_a_gpu_is_planned_with() -> None:
    device = torch.device("cuda")
    with device:
        model = LoadedModel(build_local(CONFIG.model, VOCAB, seed=0), CONFIG.model, VOCAB)
    length = CONFIG.model.seq_length
    tokens = tokens_that_fit(model, length, ParallelContext.single())
    rows = min(tokens // length, 2048)
    assert rows > 1
    wanted = torch.tensor([(row, position, 1) for row in range(rows) for position in range(length)])
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    model.score_tokens(torch.zeros((rows, length), dtype=torch.long), wanted)
    assert torch.cuda.max_memory_allocated() < free
