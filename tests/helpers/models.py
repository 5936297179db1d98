"""Small model configurations for tests."""

from __future__ import annotations

from typing import Any

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.model.causal_lm import VocabSize

VOCAB = VocabSize(actual=61, padded=64)


def tiny_tokenformer(*, tokens: ParamTokenConfig | None = None, **changes: Any) -> ModelConfig:
    """Two layers of width 32 with unequal token counts, everything else as in the published configurations."""
    published = {
        "architecture": "tokenformer",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "param_tokens": tokens or ParamTokenConfig(qkv=24, proj=16, ffn=40),
        "norm": "layernorm_nonparam",
        "final_norm": "layernorm",
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
    }
    return ModelConfig(**{**published, **changes})


def tiny_gpt2(**changes: Any) -> ModelConfig:
    """Three layers of width 32, everything else as in GPT-2, with attention scaled by the inverse layer index."""
    published = {
        "architecture": "gpt2",
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "pos_emb": "learned",
        "activation": "gelu_tanh",
        "scale_attn_by_inverse_layer_idx": True,
    }
    return ModelConfig(**{**published, **changes})


def tiny_pythia(**changes: Any) -> ModelConfig:
    """Two layers of width 32, everything else as in Pythia's configurations."""
    published = {
        "architecture": "gpt_neox",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "activation": "gelu_tanh",
        "parallel_residual": True,
        "tie_embeddings": False,
        "init_method": "small_init",
        "output_layer_init_method": "wang_init",
    }
    return ModelConfig(**{**published, **changes})


def tiny_llama(**changes: Any) -> ModelConfig:
    """Two layers of width 32 with two query heads to each head of keys and values, else as in LLaMA's configurations.

    Four heads of keys and values, so that four ranks can hold them.
    """
    published = {
        "architecture": "llama",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "ffn_hidden_size": 88,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "pos_emb": "rotary",
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-6,
        "activation": "swiglu",
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
        "tie_embeddings": False,
    }
    return ModelConfig(**{**published, **changes})
