"""Parameter names of GPT-NeoX and of the TokenFormer release, and the YAML keys that decide about each.

Names are `N.local`, as megatron/checkpointing/convert/neox/neox_files.py forms them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron.checkpointing.states.name_map import NameMap
from megatron.checkpointing.states.parameter_layout import LayerLayout
from megatron.config.sections.model import ModelConfig

NO_PARAMETERS = re.compile(r"\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)")
"""Frequencies and masks that old versions saved."""

DECIDING_KEYS = (
    (r"attention\.(query|key|value)\.", "qkv_slot_num"),
    (r"attention\.proj\.", "proj_slot_num"),
    (r"mlp\.(key|value)_param_tokens", "ffn_slot_num"),
    (r"\w+_layernorm\.", "norm"),
    (r"norm\.", "final_norm"),
    (r"attention\.\w+\.bias", "use_bias_in_attn_linear"),
    (r"mlp\.\w+\.bias", "use_bias_in_mlp"),
    (r"word_embeddings\.", "padded_vocab_size"),
    (r"final_linear\.", "no_weight_tying"),
    (r"attention\.|mlp\.", "attention_config"),
)
"""How a local name begins, and the YAML key that decides whether there is such a parameter, and its rows."""


def neox_names(model: ModelConfig, layouts: Iterable[LayerLayout]) -> NameMap:
    """Both names of every parameter of a model."""
    blocks = range(2, 2 + model.num_layers)
    return NameMap(
        prefixes=tuple(
            (layout.global_name(name), f"{_layer_number(layout, model)}.{_local_name(layout, name, model)}")
            for layout in layouts
            for name in layout.parameters
        ),
        # Newer versions of GPT-NeoX call the matrices of the MLP by their order.
        also_read=tuple(
            (f"{block}.mlp.{newer}.", f"{block}.mlp.{older}.")
            for block in blocks
            for newer, older in (("linear1", "dense_h_to_4h"), ("linear2", "dense_4h_to_h"))
        ),
        without_weights=NO_PARAMETERS,
    )


def deciding_key(name: str) -> str | None:
    """The YAML key that a tensor follows from; None for a tensor of no model that is known here."""
    local = name.partition(".")[2]
    return next((key for pattern, key in DECIDING_KEYS if re.match(pattern, local)), None)


def _layer_number(layout: LayerLayout, model: ModelConfig) -> int:
    """NeoX counts a function after the embedding and another before the final norm."""
    return layout.index + (layout.index > 0) + (layout.index > model.num_layers)


def _local_name(layout: LayerLayout, name: str, model: ModelConfig) -> str:
    if layout.name == "head":
        return f"final_linear.{name}"
    if layout.name == "final_norm":
        return "norm." + _norm_name(name, model.final_norm or model.norm)
    if "layernorm." in name:
        return _norm_name(name, model.norm)
    return re.sub(r"(key|value)_tokens$", r"\1_param_tokens", name)


def _norm_name(name: str, norm: str) -> str:
    return re.sub(r"weight$", "scale", name) if norm == "rmsnorm" else name
