"""Map of GPT-2 to transformers' GPT2LMHeadModel and back.

Its matrices are turned ("Conv1D"), and the rows of query_key_value, which are ordered by head and then q, k and v here,
are ordered by q, k and v and then by head there. GPT2LMHeadModel always has biases: those that a model of ours does not
have are zeros in its folder, whose config.json then says by our key that they are none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig

from megatron.checkpointing.states.name_map import NameMap
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.hf_architecture import HF_ARCHITECTURES, FieldMap, HFArchitecture

NAMES = NameMap(
    prefixes=(
        ("embedding.word_embeddings.", "transformer.wte."),
        ("embedding.position_embeddings.", "transformer.wpe."),
        ("layers.", "transformer.h."),
        ("final_norm.", "transformer.ln_f."),
        ("head.", "lm_head."),
    ),
    parts=(
        (".input_layernorm.", ".ln_1."),
        (".attention.query_key_value.", ".attn.c_attn."),
        (".attention.dense.", ".attn.c_proj."),
        (".post_attention_layernorm.", ".ln_2."),
        (".mlp.dense_h_to_4h.", ".mlp.c_fc."),
        (".mlp.dense_4h_to_h.", ".mlp.c_proj."),
    ),
    # Published folders hold the names of GPT2Model, which has no head.
    also_read=tuple((f"{name}.", f"transformer.{name}.") for name in ("wte", "wpe", "h", "ln_f")),
    without_weights=re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),
)

QUERY_KEY_VALUE = "attention.query_key_value."
TURNED = (f"{QUERY_KEY_VALUE}weight", "attention.dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
"""Ends of the names of matrices that are [inputs, outputs] there."""
BIASES = {
    f"{QUERY_KEY_VALUE}bias": "use_bias_in_attn_linear",
    "attention.dense.bias": "use_bias_in_attn_linear",
    "dense_h_to_4h.bias": "use_bias_in_mlp",
    "dense_4h_to_h.bias": "use_bias_in_mlp",
    "layernorm.bias": "use_bias_in_norms",
    "final_norm.bias": "use_bias_in_norms",
}
"""Ends of the names of biases, and our keys by which a model has none."""

FIELDS = FieldMap(
    same={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "layernorm_epsilon": "layer_norm_epsilon",
        "scale_attn_by_inverse_layer_idx": "scale_attn_by_inverse_layer_idx",
        "tie_embeddings": "tie_word_embeddings",
        "attention_dropout": "attn_pdrop",
        "hidden_dropout": "resid_pdrop",
        "init_method_std": "initializer_range",
    },
    fixed={"architecture": "gpt2", "norm": "layernorm", "pos_emb": "learned", "parallel_residual": False},
)

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
"""Ours to theirs."""
THEIR_ACTIVATIONS = {"gelu": "gelu"} | dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
"""Theirs to ours: the three names of the tanh formula."""


def to_config(model: ModelConfig, vocab_rows: int) -> GPT2Config:
    """Returns their configuration of our model. Raises ConfigError for a model that GPT2LMHeadModel cannot be."""
    if model.final_norm not in (None, "layernorm"):
        raise ConfigError(f"final_norm: GPT2LMHeadModel always has 'layernorm', and this model {model.final_norm!r}.")
    return GPT2Config(
        vocab_size=vocab_rows,
        n_inner=None,
        # The tokenizer's, if it is exported; the defaults are those of OpenAI's vocabulary.
        bos_token_id=None,
        eos_token_id=None,
        activation_function=ACTIVATIONS[model.activation],
        embd_pdrop=model.hidden_dropout,
        **FIELDS.to_theirs(model, "GPT2LMHeadModel"),
        **{key: False for key in BIASES.values() if not getattr(model, key)},
    )


def to_settings(config: PretrainedConfig) -> dict[str, Any]:
    """Returns our settings of their configuration. Raises ConfigError for one that our gpt2 cannot be."""
    if config.n_inner not in (None, 4 * config.n_embd):
        raise ConfigError(f"n_inner: {config.n_inner}; our MLP has 4 x n_embd = {4 * config.n_embd}.")
    if config.activation_function not in THEIR_ACTIVATIONS:
        raise ConfigError(
            f"activation_function: {config.activation_function!r}; known: {', '.join(THEIR_ACTIVATIONS)}."
        )
    if not config.scale_attn_weights:
        raise ConfigError("scale_attn_weights: false; our attention scores are always divided by sqrt(head size).")
    if config.add_cross_attention:
        raise ConfigError("add_cross_attention: true; our gpt2 has no cross-attention.")
    if config.embd_pdrop != config.resid_pdrop:
        raise ConfigError(
            f"embd_pdrop: {config.embd_pdrop}, and resid_pdrop {config.resid_pdrop}: our hidden_dropout is both. They "
            "act in training alone: make them equal in config.json, and set hidden_dropout in the run."
        )
    return (
        FIELDS.to_ours(config)
        | {"final_norm": "layernorm", "activation": THEIR_ACTIVATIONS[config.activation_function]}
        | {key: getattr(config, key, True) for key in BIASES.values()}
    )


def to_their_tensors(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns the matrices of a layer, orders q, k and v, and adds zeros for biases that the model does not have."""
    theirs = {}
    for name, tensor in tensors.items():
        ordered = _by_projection(tensor, model) if QUERY_KEY_VALUE in name else tensor
        theirs[name] = ordered.T if name.endswith(TURNED) else ordered
        bias = f"{name.removesuffix('weight')}bias"
        if bias.endswith(tuple(BIASES)) and bias not in tensors:
            theirs[bias] = tensor.new_zeros(len(tensor))
    return theirs


def to_our_tensors(model: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `to_their_tensors`. Raises CheckpointError for a bias that is not zero and that the model leaves out."""
    ours = {}
    for name, tensor in tensors.items():
        key = next((key for end, key in BIASES.items() if name.endswith(end)), None)
        if key is not None and not getattr(model, key):
            if tensor.any():
                raise CheckpointError(
                    f"{NAMES.to_theirs(name)} is not zero, and {key}: false leaves it out. Set {key}: true."
                )
            continue
        ordered = tensor.T if name.endswith(TURNED) else tensor
        ours[name] = _by_head(ordered, model) if QUERY_KEY_VALUE in name else ordered
    return ours


def _by_projection(rows: Tensor, model: ModelConfig) -> Tensor:
    return rearrange(rows, "(H J E) ... -> (J H E) ...", J=3, H=model.num_attention_heads)


def _by_head(rows: Tensor, model: ModelConfig) -> Tensor:
    return rearrange(rows, "(J H E) ... -> (H J E) ...", J=3, H=model.num_attention_heads)


HF_ARCHITECTURES.register("gpt2")(
    HFArchitecture(
        GPT2LMHeadModel,
        NAMES,
        to_config,
        to_settings,
        title="GPT-2 (Radford et al. 2019)",
        to_their_tensors=to_their_tensors,
        to_our_tensors=to_our_tensors,
    )
)
