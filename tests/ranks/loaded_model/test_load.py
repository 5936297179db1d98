"""Checkpoints of every layout are read on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.sections.reading import ReadingConfig
from megatron.loaded_model.loaded_model import load_model
from megatron.mpu.context import ParallelContext
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_checkpoints import make_checkpoint, tokens, whole_model, write_yaml

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "tensor", "pipe"),
    [
        (TOKENFORMER, 2, 2),
        (PYTHIA, 2, 1),
        (GPT2, 2, 2),
        (LLAMA, 2, 2),
        pytest.param(PYTHIA | {"no_weight_tying": False}, 1, 2, marks=pytest.mark.full),
        pytest.param(TOKENFORMER | {"no_weight_tying": True}, 2, 1, marks=pytest.mark.full),
    ],
)
def test_any_layout_is_read_on_one_rank_and_on_two(
    settings: dict[str, object], tensor: int, pipe: int, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, settings), tensor=tensor, pipe=pipe)
    with torch.no_grad():
        want = whole_model(checkpoint.config)(tokens())
    one = load_model(checkpoint.config, checkpoint, ParallelContext.single(), CPU).logits(tokens())
    torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)
    for logits in run_distributed(_logits_on_two_ranks, 2, checkpoint.path):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-4)


def _logits_on_two_ranks(path: Path, reading: ReadingConfig | None = None) -> Tensor:
    checkpoint = read_checkpoint(path)
    config = checkpoint.config.model_copy(update={"reading": reading})
    return load_model(config, checkpoint, ParallelContext.create(2, 1), CPU).logits(tokens())


@pytest.mark.parametrize("part", [{"share": 0.5}, {"top_k": 5}, {"share": 0.5, "top_k": 0.5, "block": 2}], ids="-".join)
def test_two_ranks_read_the_part_that_one_does(part: dict[str, Any], checkpoint: Checkpoint) -> None:
    """The strongest tokens are those over both ranks."""
    reading = ReadingConfig(**part)
    config = checkpoint.config.model_copy(update={"reading": reading})
    want = load_model(config, checkpoint, ParallelContext.single(), CPU).logits(tokens())
    for logits in run_distributed(_logits_on_two_ranks, 2, checkpoint.path, reading):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A TokenFormer's, of one rank."""
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("checkpoint"), TOKENFORMER))
