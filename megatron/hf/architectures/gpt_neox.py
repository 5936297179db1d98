"""Map of GPT-NeoX, and of Pythia as an instance of it, to transformers' GPTNeoXForCausalLM and back."""

from __future__ import annotations

import re
from typing import Any

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PretrainedConfig

from megatron.checkpointing.states.name_map import NameMap
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, FieldMap, HFArchitecture, default_rope

NAMES = NameMap(
    prefixes=(
        ("embedding.word_embeddings.", "gpt_neox.embed_in."),
        ("layers.", "gpt_neox.layers."),
        ("final_norm.", "gpt_neox.final_layer_norm."),
        # The name in published folders; transformers 5 calls the module lm_head and reads and writes this one.
        ("head.", "embed_out."),
    ),
    also_read=(("lm_head.", "embed_out."),),
    without_weights=re.compile(
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)|gpt_neox\.rotary_emb\.inv_freq"
    ),
)

FIELDS = FieldMap(
    same={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "layernorm_epsilon": "layer_norm_eps",
        "parallel_residual": "use_parallel_residual",
        "use_bias_in_attn_linear": "attention_bias",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
        "init_method_std": "initializer_range",
    },
    fixed={
        "architecture": "gpt_neox",
        "norm": "layernorm",
        "use_bias_in_mlp": True,
        "use_bias_in_norms": True,
        "pos_emb": "rotary",
    },
)

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Ours to theirs."""
THEIR_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Theirs to ours: the older names gelu_new and gelu_fast are the same tanh formula."""


def to_config(model: ModelConfig, vocab_rows: int) -> GPTNeoXConfig:
    """Returns their configuration of our model. Raises ConfigError for a model that GPTNeoXForCausalLM cannot be."""
    if model.final_norm not in (None, "layernorm"):
        raise ConfigError(
            f"final_norm: GPTNeoXForCausalLM always has 'layernorm', and this model {model.final_norm!r}."
        )
    return GPTNeoXConfig(
        vocab_size=vocab_rows,
        intermediate_size=4 * model.hidden_size,
        hidden_act=ACTIVATIONS[model.activation],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": model.rotary_emb_base,
            "partial_rotary_factor": model.rotary_pct,
        },
        **FIELDS.to_theirs(model, "GPTNeoXForCausalLM"),
    )


def to_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Returns our settings of their configuration. Raises ConfigError for one that our gpt_neox cannot be."""
    if config.intermediate_size != 4 * config.hidden_size:
        raise ConfigError(
            f"intermediate_size: {config.intermediate_size}; our MLP has 4 x hidden_size = {4 * config.hidden_size}."
        )
    if config.hidden_act not in THEIR_ACTIVATIONS:
        raise ConfigError(f"hidden_act: {config.hidden_act!r}; known: {', '.join(THEIR_ACTIVATIONS)}.")
    share, base = default_rope(config)
    return FIELDS.to_ours(config) | {
        "final_norm": "layernorm",
        "activation": THEIR_ACTIVATIONS[config.hidden_act],
        "rotary_pct": share,
        "rotary_emb_base": base,
    }


HF_ARCHITECTURES.register("gpt_neox")(
    HFArchitecture(GPTNeoXForCausalLM, NAMES, to_config, to_settings, title="GPT-NeoX (arXiv:2204.06745)")
)
