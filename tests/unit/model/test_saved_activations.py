"""Activations that a layer keeps for its backward pass, counted in units of B S D numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.kernels.pattention.theta import THETAS
from megatron.model.layer import TransformerLayer
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters
from tests.helpers.models import tiny_tokenformer

BATCH, LENGTH, WIDTH = 2, 64, 128
PUBLISHED_RATIOS = ParamTokenConfig(qkv=WIDTH, proj=WIDTH, ffn=4 * WIDTH)


def layer(model: ModelConfig, recompute_scores: bool) -> TransformerLayer:
    single = ParallelContext.single()
    module = TransformerLayer(model, single, 0).bfloat16()
    initialize_parameters(module.named_parameters(), 5, single)
    for part in module.modules():
        if isinstance(part, Pattention):
            part.recompute_scores = recompute_scores
    return module


def kept_and_gradients(module: TransformerLayer) -> tuple[float, list[Tensor]]:
    """Units that the forward pass keeps, each piece of memory once, without parameters; output and all gradients."""
    generator = torch.Generator().manual_seed(3)
    x, probe = (torch.randn(BATCH, LENGTH, WIDTH, generator=generator).bfloat16() for _ in range(2))
    x.requires_grad_()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(x)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], probe)
    return sum(kept.values()) / (BATCH * LENGTH * WIDTH * 2), [y.detach(), *gradients]


@pytest.mark.parametrize("theta", list(THETAS))
def test_scores_are_eight_units_that_recomputation_does_without(theta: str) -> None:
    """Scores are 3 units of query, key and value, 1 of the output projection and 4 of the feed-forward sublayer."""
    model = tiny_tokenformer(
        hidden_size=WIDTH, tokens=PUBLISHED_RATIOS.model_copy(update={"theta": theta}), norm="layernorm_nonparam"
    )
    with_scores, want = kept_and_gradients(layer(model, recompute_scores=False))
    without, got = kept_and_gradients(layer(model, recompute_scores=True))
    assert with_scores - without == 8
    assert with_scores < 18.5
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, want, strict=True))
