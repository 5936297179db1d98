"""FLOPs per token, against a counted run and against published sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.model import ModelConfig, ParamTokenConfig
from megatron.model.causal_lm import build_local
from megatron.model.flops import forward_flops, training_flops
from tests.helpers.models import VOCAB, tiny_pythia, tiny_tokenformer


@pytest.mark.parametrize("model", [tiny_tokenformer(), tiny_pythia()], ids=["tokenformer", "pythia"])
def test_counted_operations_agree(model: ModelConfig) -> None:
    """The counter sees attention as all S x S pairs; ours counts the S (S + 1) / 2 that are not masked."""
    batch, length = 2, 16
    module = build_local(model, VOCAB, seed=1)
    tokens = torch.randint(VOCAB.actual, (batch, length), generator=torch.Generator().manual_seed(1))
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with FlopCounterMode(display=False) as forward:
            logits = module(tokens)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    ours = forward_flops(model, VOCAB.padded, length)
    want = batch * length * (ours.layers + ours.head + ours.attention * 2 * length / (length + 1))
    assert forward.get_total_flops() == pytest.approx(want, rel=1e-12)
    assert backward.get_total_flops() == pytest.approx(2 * want, rel=1e-12)
    assert training_flops(model, VOCAB.padded, length) == 3 * ours.total


@pytest.mark.parametrize(
    ("layers", "width", "megaflops"), [(12, 768, 341.5), (24, 1024, 1009.0), (32, 1280, 1974.4), (40, 1536, 3426.2)]
)
def test_published_sizes(layers: int, width: int, megaflops: float) -> None:
    model = tiny_tokenformer(
        num_layers=layers, hidden_size=width, tokens=ParamTokenConfig(qkv=width, proj=width, ffn=4 * width)
    )
    assert forward_flops(model, 50_304, 2048).total / 1e6 == pytest.approx(megaflops, abs=0.1)
