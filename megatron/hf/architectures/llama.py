"""Map of LLaMA to transformers' LlamaForCausalLM and back."""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from megatron.checkpointing.states.name_map import NameMap
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, FieldMap, HFArchitecture, default_rope

NAMES = NameMap(
    prefixes=(
        ("embedding.word_embeddings.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
    ),
    parts=(
        (".attention.query.", ".self_attn.q_proj."),
        (".attention.key.", ".self_attn.k_proj."),
        (".attention.value.", ".self_attn.v_proj."),
        (".attention.dense.", ".self_attn.o_proj."),
        (".mlp.gate.", ".mlp.gate_proj."),
        (".mlp.up.", ".mlp.up_proj."),
        (".mlp.down.", ".mlp.down_proj."),
    ),
    without_weights=re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)

FIELDS = FieldMap(
    same={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_epsilon": "rms_norm_eps",
        "use_bias_in_attn_linear": "attention_bias",
        "use_bias_in_mlp": "mlp_bias",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "init_method_std": "initializer_range",
    },
    fixed={
        "architecture": "llama",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "pos_emb": "rotary",
        "rotary_pct": 1.0,
        "parallel_residual": False,
    },
)


def to_config(model: ModelConfig, vocab_rows: int) -> LlamaConfig:
    """Returns their configuration of our model. Raises ConfigError for a model that LlamaForCausalLM cannot be."""
    if model.final_norm not in (None, "rmsnorm"):
        raise ConfigError(f"final_norm: LlamaForCausalLM always has 'rmsnorm', and this model {model.final_norm!r}.")
    return LlamaConfig(
        vocab_size=vocab_rows,
        hidden_act="silu",
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_emb_base},
        **FIELDS.to_theirs(model, "LlamaForCausalLM"),
    )


def to_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Returns our settings of their configuration. Raises ConfigError for one that our llama cannot be."""
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act: {config.hidden_act!r}; the gate of our MLP is silu.")
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ConfigError(
            f"head_dim: {config.head_dim} x {config.num_attention_heads} heads are not hidden_size "
            f"{config.hidden_size}, as they are here."
        )
    return FIELDS.to_ours(config) | {"final_norm": "rmsnorm", "rotary_emb_base": default_rope(config)[1]}


HF_ARCHITECTURES.register("llama")(
    HFArchitecture(LlamaForCausalLM, NAMES, to_config, to_settings, title="LLaMA (arXiv:2302.13971)")
)
