"""Counts a model's parameters from its sizes alone."""

from __future__ import annotations

from megatron.config.sections.model import ModelConfig, Norm, ParamTokenConfig


def count_parameters(model: ModelConfig, padded_vocab_size: int) -> int:
    """Trainable parameters of the whole model; a tied head counts once.

    TokenFormer (arXiv:2410.23168, table 3): 2 d L (3 n_qkv + n_proj + n_ffn) in the layers. gpt_neox: 12 d^2 L in the
    layers' matrices, and their biases.
    """
    hidden, tokens = model.hidden_size, model.param_tokens
    layer = _gpt_neox_layer(model) if tokens is None else _tokenformer_layer(hidden, tokens)
    layer += 2 * _norm_parameters(model.norm, hidden)
    embeddings = padded_vocab_size * hidden * (1 if model.tie_embeddings else 2)
    return embeddings + model.num_layers * layer + _norm_parameters(model.final_norm or model.norm, hidden)


def _tokenformer_layer(hidden: int, tokens: ParamTokenConfig) -> int:
    """Every parameter token has a key and a value of the hidden width."""
    return 2 * hidden * (3 * tokens.qkv + tokens.proj + tokens.ffn)


def _gpt_neox_layer(model: ModelConfig) -> int:
    hidden = model.hidden_size
    attention, mlp = 4 * hidden**2, 8 * hidden**2
    if model.use_bias_in_attn_linear:
        attention += 4 * hidden
    if model.use_bias_in_mlp:
        mlp += 5 * hidden
    return attention + mlp


def _norm_parameters(norm: Norm, hidden: int) -> int:
    return {"layernorm": 2 * hidden, "rmsnorm": hidden, "layernorm_nonparam": 0}[norm]
