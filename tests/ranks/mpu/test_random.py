"""Dropout over tensor-parallel ranks: alike where activations are replicated, apart where they are split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron.config.sections.model import ModelConfig
from megatron.model.layer import HiddenDropout, TransformerLayer
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters
from megatron.mpu.random import seed_dropout
from tests.helpers.distributed import run_distributed
from tests.helpers.models import tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer


def hidden_masks(sequence_parallel: bool) -> tuple[Tensor, Tensor]:
    context = ParallelContext.create(2, 1, sequence_parallel)
    seed_dropout(4, 0, context)
    dropped = HiddenDropout(0.5, context)(torch.ones(2, 8, 16))
    return dropped, torch.get_rng_state()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hidden_dropout_differs_by_rank_only_under_sequence_parallelism(sequence_parallel: bool) -> None:
    (first, first_state), (second, second_state) = run_distributed(hidden_masks, 2, sequence_parallel)
    assert torch.equal(first, second) != sequence_parallel
    assert torch.equal(first_state, second_state)


def attention_outputs() -> tuple[Tensor, Tensor]:
    context = ParallelContext.create(2, 1)
    layer = TransformerLayer(tiny_pythia(attention_dropout=0.5), context, 0)
    seed_dropout(4, 0, context)
    q, k, v = torch.ones(3, 2, 16, 2, 8)
    return layer.attention.attend(q, k, v), torch.get_rng_state()


def test_attention_dropout_differs_between_the_heads_of_different_ranks() -> None:
    (first, first_state), (second, second_state) = run_distributed(attention_outputs, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first_state, second_state)


def gradients(model: ModelConfig, sequence_parallel: bool, recompute: bool) -> list[Tensor]:
    context = ParallelContext.create(2, 1, sequence_parallel)
    layer = TransformerLayer(model, context, 0)
    initialize_parameters(layer.named_parameters(), 1, context)
    seed_dropout(5, 0, context)
    length = 8 if sequence_parallel else 16
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
    torch.rand(11)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("build", [tiny_tokenformer, tiny_pythia, tiny_gpt2, tiny_llama])
def test_recomputation_restores_every_number(build, sequence_parallel: bool) -> None:
    model = build(hidden_dropout=0.3, attention_dropout=0.3)
    plain, recomputed = (run_distributed(gradients, 2, model, sequence_parallel, again) for again in (False, True))
    for want, got in zip(plain, recomputed, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
