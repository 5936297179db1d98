"""LLaMA (Touvron et al. 2023, arXiv:2302.13971): RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

from megatron.config.architecture import ARCHITECTURES, ArchitectureFacts
from megatron.config.sections.model import ModelConfig
from megatron.config.yaml.problems import YamlValue

Flat = Mapping[str, YamlValue]


def key_value_heads(model: ModelConfig) -> int:
    """Returns the heads of keys and values: as many as query heads unless the configuration has fewer."""
    return model.num_kv_heads or model.num_attention_heads


def feed_forward_width(model: ModelConfig) -> int:
    """Returns the width inside the MLP, which a configuration of this architecture always has.

    Raises ValueError for a model that was put together without it.
    """
    if model.ffn_hidden_size is None:
        raise ValueError(f"architecture {model.architecture} needs model.ffn_hidden_size")
    return model.ffn_hidden_size


def layer_matrices(model: ModelConfig) -> int:
    """Counts 2 D^2 weights of queries and outputs, 2 D (D/H) G of keys and values for G heads, and 3 D F in the MLP."""
    hidden = model.hidden_size
    key_value = hidden // model.num_attention_heads * key_value_heads(model)
    return hidden * (2 * hidden + 2 * key_value + 3 * feed_forward_width(model))


def layer_biases(model: ModelConfig) -> int:
    """Counts a bias for each output of the four attention projections and of the three MLP matrices."""
    hidden = model.hidden_size
    key_value = hidden // model.num_attention_heads * key_value_heads(model)
    attention = 2 * (hidden + key_value) if model.use_bias_in_attn_linear else 0
    mlp = 2 * feed_forward_width(model) + hidden if model.use_bias_in_mlp else 0
    return attention + mlp


def is_llama(given: Flat) -> bool:
    """Tells whether NeoX's keys describe a gated MLP, which this architecture alone has."""
    return given.get("activation") == "swiglu" or given.get("mlp_type") == "llama"


def default_width(given: Flat) -> int | None:
    """Returns the width inside the MLP that follows from flat keys; None where they are no sizes.

    NeoX's `activation: swiglu` takes intermediate_size, or expansion_factor times hidden_size, or 4 times, for three
    times the width, and rounds that up to a multiple of mlp_multiple_of (its megatron/model/transformer.py,
    ParallelMLP). Its older `mlp_type: llama` takes intermediate_size for the width itself. Without that, and outside of
    NeoX, the width is LLaMA's own: 8/3 of hidden_size, rounded up to a multiple of 256.
    """
    hidden, size = given.get("hidden_size"), given.get("intermediate_size")
    if not _is_size(hidden):
        return None
    if "architecture" in given or given.get("mlp_type") == "llama":
        return size if _is_size(size) else _round_up(8 * hidden // 3, 256)
    factor, multiple = given.get("expansion_factor", 4), given.get("mlp_multiple_of", 1)
    if not (_is_size(multiple) and isinstance(factor, int | float) and 0 < factor < _LARGEST):
        return None
    return _round_up((size if _is_size(size) else int(factor * hidden)) * 2 // 3 // 2, multiple)


_LARGEST = 10**6


def _is_size(value: YamlValue) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 3 * _LARGEST


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


_BIASES = "use_bias_in_attn_linear", "use_bias_in_mlp"

ARCHITECTURES.register("llama")(
    ArchitectureFacts(
        layer_matrices,
        layer_biases,
        attention_types=("flash", "global"),
        output_weights=("attention.dense.weight", "attention.dense.bias", "mlp.down.weight", "mlp.down.bias"),
        split_sizes=("ffn_hidden_size",),
        prompts_begin_with_bos=True,
        own_fields=("num_kv_heads", "ffn_hidden_size"),
        is_implied_by=is_llama,
        activations=("swiglu",),
        defaults={"norm": "rmsnorm", "activation": "swiglu"} | dict.fromkeys(_BIASES, False),
        derived={
            "num_kv_heads": lambda given: given.get("num_attention_heads"),
            "ffn_hidden_size": default_width,
            "use_bias_in_mlp": lambda given: False if given.get("mlp_type") == "llama" else None,
        },
    )
)
