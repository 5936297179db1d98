"""The gpt2 architecture computes what transformers' GPT2LMHeadModel computes: logits and every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.config.model_size import count_parameters
from megatron.config.sections.model import ModelConfig
from megatron.model.causal_lm import LocalCausalLM, build_local
from tests.helpers.models import VOCAB, tiny_gpt2
from tests.helpers.transformers_pairs import assert_same_logits_and_loss

HEADS, SIZE = 4, 8


def transformers_model(model: ModelConfig, rows: int = VOCAB.padded) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=rows,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        layer_norm_epsilon=model.layernorm_epsilon,
        scale_attn_by_inverse_layer_idx=model.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


def same_in_transformers(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and the form of one of our parameters, or of its gradient, there."""
    if name == "head.weight":
        return "lm_head.weight", tensor
    if "query_key_value" in name:
        # Ours has for each head the rows of its query, key and value; theirs has all queries, all keys, all values.
        heads = [tensor[head * 3 * SIZE : (head + 1) * 3 * SIZE] for head in range(HEADS)]
        tensor = torch.cat([rows[part * SIZE : (part + 1) * SIZE] for part in range(3) for rows in heads])
    is_linear = any(word in name for word in ("query_key_value", "dense"))
    if is_linear and tensor.dim() == 2:
        tensor = tensor.t()
    for ours, theirs in (
        ("embedding.word_embeddings", "wte"),
        ("embedding.position_embeddings", "wpe"),
        ("layers.", "h."),
        ("final_norm", "ln_f"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
        ("attention.query_key_value", "attn.c_attn"),
        ("attention.dense", "attn.c_proj"),
        ("dense_h_to_4h", "c_fc"),
        ("dense_4h_to_h", "c_proj"),
    ):
        name = name.replace(ours, theirs)
    return f"transformer.{name}", tensor


def matching_pair(model: ModelConfig, dtype: torch.dtype) -> tuple[LocalCausalLM, GPT2LMHeadModel]:
    """Both models with the same numbers; biases that ours lacks are zeros there, as they are initialized."""
    ours, theirs = build_local(model, VOCAB, seed=5).to(dtype), transformers_model(model).to(dtype)
    generator = torch.Generator().manual_seed(11)
    their_parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # Biases and norm scales too: at 0 and 1 they would test little.
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
            their_name, tensor = same_in_transformers(name, parameter)
            their_parameters.pop(their_name).copy_(tensor)
    assert all(name.endswith(".bias") and not parameter.any() for name, parameter in their_parameters.items())
    return ours, theirs


VARIANTS: dict[str, dict[str, Any]] = {
    "scaled": {},
    "unscaled": {"scale_attn_by_inverse_layer_idx": False},
    "erf": {"activation": "gelu"},
    "untied": {"tie_embeddings": False},
    "no_biases": {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "use_bias_in_norms": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_logits_and_gradients_agree(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = matching_pair(tiny_gpt2(**VARIANTS[variant]), dtype)
    assert_same_logits_and_loss(ours, theirs, tolerance)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for their_name, gradient in our_gradients(ours):
        torch.testing.assert_close(
            gradient, gradients[their_name], rtol=tolerance, atol=tolerance, msg=lambda m, n=their_name: f"{n}: {m}"
        )


def our_gradients(ours: LocalCausalLM) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        yield same_in_transformers(name, parameter.grad)


def test_scaling_by_the_layer_index_tells() -> None:
    """The two variants are different functions, and the first layer is the same in both."""
    tokens = torch.randint(VOCAB.actual, (1, 9), generator=torch.Generator().manual_seed(2))
    one, three = (
        [
            matching_pair(tiny_gpt2(num_layers=layers, scale_attn_by_inverse_layer_idx=scaled), torch.float64)[0](
                tokens
            )
            for scaled in (True, False)
        ]
        for layers in (1, 3)
    )
    torch.testing.assert_close(one[0], one[1], rtol=1e-12, atol=1e-12)
    assert (three[0] - three[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "width", "heads", "published"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_parameters_of_the_published_sizes(layers: int, width: int, heads: int, published: int) -> None:
    """The published folders' own numbers, and those of transformers' modules."""
    model = tiny_gpt2(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        scale_attn_by_inverse_layer_idx=False,
    )
    with torch.device("meta"):
        theirs = transformers_model(model, rows=50257)
    assert count_parameters(model, 50257) == published == theirs.num_parameters()
