"""A part of a checkpoint's parameter tokens: shares, and the strongest tokens of each position."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.sections.reading import ReadingConfig
from megatron.errors import ConfigError
from megatron.kernels.pattention.theta import THETAS, RowReduction
from megatron.kernels.pattention.top_k import SPARSE_BLOCK, TopKPattention, ValueReads
from megatron.loaded_model.loaded_model import LoadedModel, load_model
from megatron.mpu.context import ParallelContext
from tests.helpers.configs import TOKENFORMER
from tests.helpers.tiny_checkpoints import make_checkpoint, tokens, write_yaml
from tools.ckpts import extract

KEYS: dict[str, Any] = TOKENFORMER | {"qkv_slot_num": 32, "proj_slot_num": 32, "param_token_groups": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("read"), KEYS))


def loaded(checkpoint: Checkpoint, **reading: Any) -> LoadedModel:
    config = checkpoint.config.model_copy(update={"reading": ReadingConfig(**reading) if reading else None})
    return load_model(config, checkpoint, ParallelContext.single(), torch.device("cpu"))


def test_a_share_that_is_read_is_the_extracted_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """To 1e-6 of the largest logit."""
    words = ["--input_dir", str(checkpoint.path), "--output_dir", str(tmp_path / "half"), "--share", "0.5"]
    assert extract.main(words) == 0
    half = read_checkpoint(tmp_path / "half" / checkpoint.path.name)
    expected = loaded(half).logits(tokens())
    read = loaded(checkpoint, share=0.5)
    assert (read.logits(tokens()) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert sum(p.numel() for p in read.module.parameters()) == sum(w.numel() for w in read_weights(half).values())
    assert (loaded(checkpoint).logits(tokens()) - expected).abs().max() > 0.1 * expected.abs().max()


def strongest(
    x: Tensor, keys: Tensor, values: Tensor, theta: str, scale: int, count: int, block: int
) -> tuple[Tensor, int]:
    """Position by position and block by block; also how many values of blocks of 32 were read."""
    weights = THETAS[theta].definition(x @ keys.T, scale)
    output, in_blocks = torch.zeros(*x.shape[:-1], values.shape[1], dtype=x.dtype), 0
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).tolist():
        own = weights[tuple(place)]
        strengths = [
            sum(float(own[token].abs() * values[token].norm()) for token in range(first, first + block))
            for first in range(0, len(values), block)
        ]
        chosen = sorted(range(len(strengths)), key=lambda number: -strengths[number])[: count // block]
        rows = [number * block + offset for number in chosen for offset in range(block)]
        output[tuple(place)] = sum(own[row] * values[row] for row in rows)
        touched = {row // SPARSE_BLOCK for row in rows}
        in_blocks += sum(min(SPARSE_BLOCK, len(values) - SPARSE_BLOCK * number) for number in touched)
    return output, in_blocks


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize(("count", "block"), [(5, 1), (16, 8), (80, 1)])
def test_the_strongest_tokens_are_those_of_a_loop(theta: str, count: int, block: int) -> None:
    """In float64, for three projections of one input; the normalization is over all tokens."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, keys, values = drawn(2, 3, 6), [drawn(80, 6) for _ in range(3)], [drawn(80, 4) for _ in range(3)]
    reads = ValueReads()
    found = TopKPattention(count, block, reads)(x, keys, values, theta=theta, scale_base=24, rows=RowReduction())
    in_blocks = 0
    for index in range(3):
        expected, read = strongest(x, keys[index], values[index], theta, 24, count, block)
        torch.testing.assert_close(found[index], expected, rtol=1e-12, atol=1e-12)
        in_blocks += read
    assert (reads.everything, reads.chosen, reads.in_blocks) == (3 * 6 * 80, 3 * 6 * count, in_blocks)


def test_all_tokens_are_the_model_and_a_part_is_of_each_pattention(checkpoint: Checkpoint) -> None:
    whole = loaded(checkpoint).logits(tokens())
    everything = loaded(checkpoint, top_k=48)
    assert (everything.logits(tokens()) - whole).abs().max() <= 1e-5 * whole.abs().max()
    half = loaded(checkpoint, top_k=0.5)
    half.logits(tokens())
    assert half.reads is not None and half.reads.chosen == half.reads.everything / 2
    both = loaded(checkpoint, share=0.5, top_k=6)
    both.logits(tokens())
    positions = math.prod(tokens().shape)
    assert both.reads is not None
    assert both.reads.everything == 2 * positions * (3 * 16 + 16 + 24)
    assert both.reads.chosen == 2 * positions * 5 * 6


def test_blocks_must_be_whole(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="param_token_block: 32: a rank holds 48 tokens of a Pattention"):
        loaded(checkpoint, top_k=32, block=32)
    with pytest.raises(ConfigError, match=r"param_token_share 0\.3: takes no whole number"):
        loaded(checkpoint, share=0.3)
