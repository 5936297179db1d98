"""Dropout where configured, nowhere else, and restored when activations are recomputed."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron.model.causal_lm import build_local
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

TOKENS = torch.randint(VOCAB.actual, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("build", [tiny_tokenformer, tiny_pythia, tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(build, kind: str) -> None:
    torch.manual_seed(0)
    module = build_local(build(**{kind: 0.3}), VOCAB, seed=1)
    plain = build_local(build(), VOCAB, seed=1)
    assert torch.equal(plain(TOKENS), plain(TOKENS))
    assert not torch.equal(module(TOKENS), module(TOKENS))
    assert torch.equal(module.eval()(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("build", [tiny_tokenformer, tiny_pythia, tiny_gpt2, tiny_llama])
def test_recomputation_draws_the_same_numbers(build) -> None:
    module = build_local(build(hidden_dropout=0.3, attention_dropout=0.3), VOCAB, seed=1)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(2))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        layer = module.layers[0]
        y = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        torch.rand(7)  # whoever draws between forward and backward
        y.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_hidden_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    module = build_local(tiny_tokenformer(hidden_dropout=0.25), VOCAB, seed=1)
    kept = module.layers[0].dropout(torch.ones(200, 200))
    assert sorted(kept.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)
