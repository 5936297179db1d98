"""Whole models split over tensor-parallel ranks against the unsplit model: logits, input and weight gradients, loss."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.kernels.pattention.theta import THETAS
from megatron.model.causal_lm import LocalCausalLM, build_local
from megatron.model.embedding import head_factors, tied_logits
from megatron.model.layer import TransformerLayer
from megatron.model.loss import CausalLMLoss, FusedCausalLMLoss
from megatron.mpu import linear_cross_entropy
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters, local_shard, parameter_spec
from tests.helpers.distributed import run_distributed
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

TOLERANCE = 1e-9


def largest_difference(got: Tensor, want: Tensor) -> float:
    """Relative to the largest element of what is wanted."""
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def residual_share(x_BSD: Tensor, context: ParallelContext) -> Tensor:
    return local_shard(x_BSD, 1 if context.sequence_parallel else None, context)


def prepared(module: torch.nn.Module, context: ParallelContext) -> torch.nn.Module:
    """Float64 weights of ordinary size, alike for every layout; norms and biases away from 1 and 0."""

    def spread(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.1, 0.3, generator=generator)

    for parameter in module.parameters():
        parameter.__dict__["spec"] = parameter_spec(parameter).__class__(
            **{**vars(parameter_spec(parameter)), "initializer": spread}
        )
    module.double()
    initialize_parameters(module.named_parameters(), 3, context)
    return module


def block_errors(model: ModelConfig, sequence_parallel: bool) -> dict[str, float]:
    """Errors of one transformer layer on this rank, against the unsplit layer computed beside it."""
    context = ParallelContext.create(torch.distributed.get_world_size(), 1, sequence_parallel)
    generator = torch.Generator().manual_seed(8)
    x, probe = (torch.randn(2, 16, model.hidden_size, generator=generator, dtype=torch.float64) for _ in range(2))

    whole = prepared(TransformerLayer(model, ParallelContext.single(), 0), ParallelContext.single())
    whole_x = x.clone().requires_grad_()
    whole_y = whole(whole_x)
    whole_y.backward(probe)

    split = prepared(TransformerLayer(model, context, 0), context)
    split_x = residual_share(x, context).clone().requires_grad_()
    split_y = split(split_x)
    split_y.backward(residual_share(probe, context))

    errors = {
        "output": largest_difference(split_y, residual_share(whole_y, context)),
        "input gradient": largest_difference(split_x.grad, residual_share(whole_x.grad, context)),
    }
    whole_parameters = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        shard_dim = parameter_spec(parameter).shard_dim
        errors[name] = largest_difference(parameter.grad, local_shard(whole_parameters[name].grad, shard_dim, context))
    return errors


def tokenformer_with(theta: str) -> ModelConfig:
    return tiny_tokenformer(
        tokens=ParamTokenConfig(qkv=24, proj=16, ffn=40, theta=theta, ffn_scale_base=32), norm="layernorm"
    )


BLOCKS = {
    **{theta: tokenformer_with(theta) for theta in THETAS},
    "pythia": tiny_pythia(),
    "gpt2": tiny_gpt2(use_bias_in_norms=False),
    "llama": tiny_llama(),
    "llama, biases": tiny_llama(use_bias_in_attn_linear=True, use_bias_in_mlp=True),
    "sequential": tiny_pythia(parallel_residual=False, norm="rmsnorm"),
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_block_equals_the_unsplit_block(block: str, sequence_parallel: bool, tensor: int) -> None:
    model = BLOCKS[block]
    for rank, errors in enumerate(run_distributed(block_errors, tensor, model, sequence_parallel)):
        assert len(errors) > 10
        assert all(error < TOLERANCE for error in errors.values()), (rank, errors)


def model_errors(model: ModelConfig, sequence_parallel: bool) -> dict[str, float]:
    """Errors of embedding, layers, head and loss together, with the loss of whole logits and with that in chunks."""
    context = ParallelContext.create(torch.distributed.get_world_size(), 1, sequence_parallel)
    generator = torch.Generator().manual_seed(8)
    tokens, labels = torch.randint(VOCAB.actual, (2, 2, 16), generator=generator)
    mask = (torch.rand(2, 16, generator=generator) < 0.7).double()
    num_valid = VOCAB.actual if model.mask_padded_vocab else None

    single = ParallelContext.single()
    whole = prepared(build_local(model, VOCAB, None), single)
    whole_logits = whole(tokens)
    whole_loss = CausalLMLoss(num_valid, single)(whole_logits, (labels, mask))
    whole_loss.backward()

    split = prepared(build_local(model, VOCAB, None, context), context)
    errors = {"logits": largest_difference(split(tokens), whole_logits)}
    whole_parameters = dict(whole.named_parameters())
    for kind in (CausalLMLoss, FusedCausalLMLoss):
        split.zero_grad()
        loss = split_loss(kind, split, tokens, (labels, mask), num_valid)
        loss.backward()
        errors[kind.__name__] = largest_difference(loss, whole_loss)
        for name, parameter in split.named_parameters():
            want = local_shard(whole_parameters[name].grad, parameter_spec(parameter).shard_dim, context)
            errors[f"{kind.__name__} {name}"] = largest_difference(parameter.grad, want)
    return errors


def split_loss(
    kind: type[CausalLMLoss | FusedCausalLMLoss],
    model: LocalCausalLM,
    tokens: Tensor,
    targets: tuple[Tensor, Tensor],
    num_valid: int | None,
) -> Tensor:
    """Loss as the last pipeline stage computes it: of logits [B, S, V/tp], or, in five chunks, of their factors."""
    x = model.embedding(tokens)
    for layer in model.layers:
        x = layer(x)
    x, head = model.final_norm(x), model.embedding if model.head is None else model.head
    if kind is CausalLMLoss:
        logits = head(x) if model.head is not None else tied_logits(head, x)
        return CausalLMLoss(num_valid, model.context)(logits, targets)
    rows_of_seven = 7 * VOCAB.padded // model.context.tensor_size * 8
    with mock.patch.dict(linear_cross_entropy.CHUNK_BYTES, cpu=rows_of_seven):
        return FusedCausalLMLoss(num_valid, model.context)(head_factors(head, x), targets)


MODELS = {
    "tied tokenformer": tiny_tokenformer(),
    "untied tokenformer": tiny_tokenformer(tie_embeddings=False, mask_padded_vocab=True),
    "untied pythia": tiny_pythia(),
    "gpt2": tiny_gpt2(),
    "llama": tiny_llama(),
    "tied pythia": tiny_pythia(tie_embeddings=True, mask_padded_vocab=True),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tensor", [2, 4])
def test_model_and_loss_equal_the_unsplit_ones(name: str, sequence_parallel: bool, tensor: int) -> None:
    for rank, errors in enumerate(run_distributed(model_errors, tensor, MODELS[name], sequence_parallel)):
        assert all(error < TOLERANCE for error in errors.values()), (rank, errors)


def gradient_through_whole_logits(model: ModelConfig) -> float:
    context = ParallelContext.create(torch.distributed.get_world_size(), 1)
    tokens = torch.randint(VOCAB.actual, (2, 16), generator=torch.Generator().manual_seed(8))
    gradients = []
    for where in (ParallelContext.single(), context):
        module = prepared(build_local(model, VOCAB, None, where), where)
        module(tokens).square().mean().backward()
        gradients.append(module.final_norm.weight.grad)
    return largest_difference(*gradients)


def test_whole_logits_lead_back_to_the_same_gradients() -> None:
    for error in run_distributed(gradient_through_whole_logits, 2, tiny_pythia()):
        assert error < TOLERANCE


def bfloat16_outputs(model: ModelConfig, sequence_parallel: bool) -> list[Tensor]:
    context = ParallelContext.create(torch.distributed.get_world_size(), 1, sequence_parallel)
    layer = prepared(TransformerLayer(model, context, 0), context).bfloat16()
    x = torch.randn(2, 16, model.hidden_size, generator=torch.Generator().manual_seed(8)).bfloat16()
    leaf = residual_share(x, context).clone().requires_grad_()
    y = layer(leaf)
    y.sum().backward()
    return [y.detach().float(), leaf.grad.float()]


@pytest.mark.parametrize("block", ["l2_norm_gelu", "pythia"])
def test_bfloat16_stays_near_the_unsplit_block(block: str) -> None:
    """Within a band of ten roundings of bf16 (2^-8 relative), in the norm."""
    whole = run_distributed(bfloat16_outputs, 1, BLOCKS[block], False)[0]
    split = [
        torch.cat(parts, dim=1)
        for parts in zip(*run_distributed(bfloat16_outputs, 2, BLOCKS[block], True), strict=True)
    ]
    for got, want in zip(split, whole, strict=True):
        assert float((got - want).norm() / want.norm()) < 10 * 2**-8
