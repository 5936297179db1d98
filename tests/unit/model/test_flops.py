"""FLOPs per token, against a counted run and against published sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.config.model_size import forward_flops, training_flops
from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.model.causal_lm import build_local
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer


@pytest.mark.parametrize(
    "model",
    [tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_llama()],
    ids=["tokenformer", "pythia", "gpt2", "llama"],
)
def test_counted_operations_agree(model: ModelConfig) -> None:
    """The counter sees attention as all S x S pairs, masked or not, as we do."""
    batch, length = 2, 16
    module = build_local(model, VOCAB, seed=1)
    tokens = torch.randint(VOCAB.actual, (batch, length), generator=torch.Generator().manual_seed(1))
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        with FlopCounterMode(display=False) as forward:
            logits = module(tokens)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    ours = forward_flops(model, VOCAB.padded, length)
    assert forward.get_total_flops() == batch * length * ours.total
    assert backward.get_total_flops() == 2 * batch * length * ours.total
    assert training_flops(model, VOCAB.padded, length) == 3 * ours.total


@pytest.mark.parametrize(
    ("layers", "width", "published"),
    # Parameter attention and head [MFLOP per token] of the published models: n_qkv = n_proj = d, n_ffn = 4d.
    [(12, 768, 226.5 + 77.3), (24, 1024, 805.3 + 103.0), (32, 1280, 1677.7 + 128.8), (40, 1536, 3019.9 + 154.5)],
)
def test_published_sizes(layers: int, width: int, published: float) -> None:
    model = tiny_tokenformer(
        num_layers=layers, hidden_size=width, tokens=ParamTokenConfig(qkv=width, proj=width, ffn=4 * width)
    )
    flops = forward_flops(model, 50_304, 2048)
    assert (flops.layers + flops.head) / 1e6 == pytest.approx(published, abs=0.1)
    assert flops.attention == 4 * layers * 2048 * width
    assert flops.total == flops.layers + flops.attention + flops.head
