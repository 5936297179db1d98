"""Map of TokenFormer to its Hugging Face form, which megatron/hf/modeling_tokenformer.py defines, and back."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from megatron.checkpointing.states.name_map import NameMap
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, FieldMap, HFArchitecture, default_rope
from megatron.hf.modeling_tokenformer import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    TokenFormerForSequenceClassification,
    TokenFormerModel,
)

NAMES = NameMap(
    prefixes=(
        ("embedding.word_embeddings.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
    )
)

FIELDS = FieldMap(
    same={
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "param_tokens.qkv": "num_qkv_tokens",
        "param_tokens.proj": "num_proj_tokens",
        "param_tokens.ffn": "num_ffn_tokens",
        "param_tokens.qkv_scale_base": "qkv_scale_base",
        "param_tokens.proj_scale_base": "proj_scale_base",
        "param_tokens.ffn_scale_base": "ffn_scale_base",
        "param_tokens.theta": "theta",
        "param_tokens.groups": "param_token_groups",
        "norm": "norm",
        "layernorm_epsilon": "layer_norm_eps",
        "rms_norm_epsilon": "rms_norm_eps",
        "parallel_residual": "use_parallel_residual",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
        "init_method_std": "initializer_range",
    },
    fixed={"architecture": "tokenformer", "use_bias_in_norms": True},
)


def to_config(model: ModelConfig, vocab_rows: int) -> TokenFormerConfig:
    """Returns their configuration of our model. Raises ConfigError for learned positions, which theirs has not."""
    if model.pos_emb == "learned":
        raise ConfigError("pos_emb: this model has learned positions, TokenFormerForCausalLM none. It has no export.")
    return TokenFormerConfig(
        vocab_size=vocab_rows,
        final_norm=model.final_norm or model.norm,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": model.rotary_emb_base,
            "partial_rotary_factor": model.rotary_pct if model.pos_emb == "rotary" else 0.0,
        },
        **FIELDS.to_theirs(model, "TokenFormerForCausalLM"),
    )


def to_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Returns our settings of their configuration.

    Raises ConfigError for scaled rotary positions, unknown here, and for a share of the tokens, no model of its own.
    """
    if config.param_token_share != 1.0:
        raise ConfigError(
            f"param_token_share: {config.param_token_share:g} in config.json reads a part of weights that are whole. "
            "Set it to 1 to import the whole model; tools/ckpts/extract.py makes the smaller one of it."
        )
    share, base = default_rope(config)
    positions = {"pos_emb": "rotary", "rotary_pct": share} if share else {"pos_emb": "none"}
    return FIELDS.to_ours(config) | positions | {"final_norm": config.final_norm, "rotary_emb_base": base}


HF_ARCHITECTURES.register("tokenformer")(
    HFArchitecture(TokenFormerForCausalLM, NAMES, to_config, to_settings, title="TokenFormer (arXiv:2410.23168)")
)

AutoConfig.register("tokenformer", TokenFormerConfig)
AutoModel.register(TokenFormerConfig, TokenFormerModel)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM)
AutoModelForSequenceClassification.register(TokenFormerConfig, TokenFormerForSequenceClassification)
