"""The gpt_neox architecture computes what transformers' GPTNeoXForCausalLM computes: logits and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron.config.sections.model import ModelConfig
from megatron.model.causal_lm import LocalCausalLM, build_local
from tests.helpers.models import VOCAB, tiny_pythia
from tests.helpers.transformers_pairs import assert_same_logits_and_loss


def transformers_model(model: ModelConfig, dtype: torch.dtype) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=VOCAB.padded,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=4 * model.hidden_size,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[model.activation],
        rotary_pct=model.rotary_pct,
        max_position_embeddings=model.max_position_embeddings,
        layer_norm_eps=model.layernorm_epsilon,
        use_parallel_residual=model.parallel_residual,
        attention_bias=model.use_bias_in_attn_linear,
        tie_word_embeddings=model.tie_embeddings,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attn_implementation="sdpa",
    )
    return GPTNeoXForCausalLM(config).to(dtype)


def transformers_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for ours, theirs in (("embedding.word_embeddings", "embed_in"), ("final_norm", "final_layer_norm")):
        name = name.replace(ours, theirs)
    return f"gpt_neox.{name}"


def matching_pair(model: ModelConfig, dtype: torch.dtype) -> tuple[LocalCausalLM, GPTNeoXForCausalLM]:
    ours, theirs = build_local(model, VOCAB, seed=5).to(dtype), transformers_model(model, dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norm scales too: at 0 and 1 they would test little
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        their_parameters = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            their_parameters.pop(transformers_name(name)).copy_(parameter)
    assert not their_parameters
    return ours, theirs


VARIANTS = {
    "pythia": {},
    "sequential": {"parallel_residual": False},
    "erf": {"activation": "gelu"},
    "tied": {"tie_embeddings": True},
    "rotary_all": {"rotary_pct": 1.0},
    "no_attention_bias": {"use_bias_in_attn_linear": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_logits_and_gradients_agree(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = matching_pair(tiny_pythia(**VARIANTS[variant]), dtype)
    assert_same_logits_and_loss(ours, theirs, tolerance)
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        their_gradient = their_parameters[transformers_name(name)].grad
        torch.testing.assert_close(
            parameter.grad, their_gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_new_gelu_is_the_same_function() -> None:
    """NeoX's fused bias_gelu, transformers' gelu_new and our gelu_tanh."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    want = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    from megatron.model.mlp import ACTIVATIONS

    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), want, rtol=1e-12, atol=1e-12)
