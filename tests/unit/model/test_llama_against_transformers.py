"""The llama architecture computes what transformers' LlamaForCausalLM computes: logits and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.config.sections.model import ModelConfig
from megatron.model.causal_lm import LocalCausalLM, build_local
from tests.helpers import plain_torch
from tests.helpers.models import VOCAB, tiny_llama
from tests.helpers.transformers_pairs import assert_same_logits_and_loss


def transformers_model(model: ModelConfig) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB.padded,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_kv_heads,
        hidden_act="silu",
        rms_norm_eps=model.rms_norm_epsilon,
        rope_theta=model.rotary_emb_base,
        max_position_embeddings=model.max_position_embeddings,
        attention_bias=model.use_bias_in_attn_linear,
        mlp_bias=model.use_bias_in_mlp,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def transformers_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for ours, theirs in {
        "embedding.word_embeddings": "embed_tokens",
        "final_norm": "norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.dense": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }.items():
        name = name.replace(ours, theirs)
    return f"model.{name}"


def perturbed(model: ModelConfig, dtype: torch.dtype) -> LocalCausalLM:
    """Norm scales and biases as well: at 1 and 0 they would test little."""
    module = build_local(model, VOCAB, seed=5).to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return module


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "as many heads of keys and values": {"num_kv_heads": 8},
    "one head of keys and values": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "biases": {"use_bias_in_attn_linear": True, "use_bias_in_mlp": True},
    "another base": {"rotary_emb_base": 500000.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_agree(variant: str) -> None:
    """In float32, to which LlamaForCausalLM takes its norms in any format."""
    model, tolerance = tiny_llama(**VARIANTS[variant]), 2e-6
    ours, theirs = perturbed(model, torch.float32), transformers_model(model)
    their_parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            their_parameters.pop(transformers_name(name)).copy_(parameter)
    assert not their_parameters
    assert_same_logits_and_loss(ours, theirs, tolerance)
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert_gradients_agree(
        ours, {name: their_gradients[transformers_name(name)] for name, _ in ours.named_parameters()}, tolerance
    )


@pytest.mark.parametrize("variant", ["grouped", "as many heads of keys and values", "tied"])
def test_float64_agrees_with_the_published_formulas(variant: str) -> None:
    """Without rotary positions, whose angles are float32 in any format; the comparison above has them."""
    model = tiny_llama(**VARIANTS[variant], pos_emb="none")
    ours = perturbed(model, torch.float64)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in ours.named_parameters()}
    tokens = torch.randint(VOCAB.actual, (3, 16), generator=torch.Generator().manual_seed(2))
    logits = ours(tokens)
    plain = plain_torch.llama(weights, tokens, model.model_dump() | {"rotary_pct": 0.0})
    torch.testing.assert_close(logits, plain, rtol=1e-12, atol=1e-12)
    logits.square().mean().backward()
    plain.square().mean().backward()
    assert_gradients_agree(ours, {name: weight.grad for name, weight in weights.items()}, 1e-12)


def assert_gradients_agree(ours: LocalCausalLM, want: dict[str, Tensor | None], tolerance: float) -> None:
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, want[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
