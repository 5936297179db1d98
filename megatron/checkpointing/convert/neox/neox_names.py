"""Parameter names of NeoX's checkpoints, and the YAML keys that decide about each.

Names are `N.local`, as megatron/checkpointing/convert/neox/neox_files.py forms them. An architecture's own are in
`architectures/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES
from megatron.checkpointing.states.name_map import NameMap
from megatron.checkpointing.states.parameter_layout import LayerLayout
from megatron.config.sections.model import ModelConfig

NO_PARAMETERS = re.compile(r"\d+\.attention\.(rotary_emb\.inv_freq|bias|masked_bias)")
"""Frequencies and masks that old versions saved."""

DECIDING_KEYS = (
    (r"\w+_layernorm\.", "norm"),
    (r"norm\.", "final_norm"),
    (r"position_embeddings\.", "pos_emb"),
    (r"word_embeddings\.", "padded_vocab_size"),
    (r"final_linear\.", "no_weight_tying"),
    (r"attention\.|mlp\.", "attention_config"),
)
"""Beginning of a local name, as a pattern, and the YAML key that decides about it, where no architecture's own does."""


def neox_names(model: ModelConfig, layouts: Iterable[LayerLayout]) -> NameMap:
    """Returns both names of every parameter of a model."""
    blocks = range(2, 2 + model.num_layers)
    also_read = NEOX_ARCHITECTURES[model.architecture].also_read
    return NameMap(
        prefixes=tuple(
            (layout.global_name(name), f"{_layer_number(layout, model)}.{_local_name(layout, name, model)}")
            for layout in layouts
            for name in layout.parameters
        ),
        also_read=tuple((f"{block}.{other}", f"{block}.{usual}") for block in blocks for other, usual in also_read),
        without_weights=NO_PARAMETERS,
    )


def deciding_key(name: str) -> str | None:
    """Returns the YAML key that a tensor follows from; None for a tensor of no model that is known here."""
    local = name.partition(".")[2]
    own = [rule for architecture in NEOX_ARCHITECTURES for rule in NEOX_ARCHITECTURES[architecture].deciding_keys]
    return next((key for pattern, key in (*own, *DECIDING_KEYS) if re.match(pattern, local)), None)


def _layer_number(layout: LayerLayout, model: ModelConfig) -> int:
    """Returns a layer's place in NeoX's list, which has a function after the embedding and before the final norm."""
    return layout.index + (layout.index > 0) + (layout.index > model.num_layers)


def _local_name(layout: LayerLayout, name: str, model: ModelConfig) -> str:
    if layout.name == "head":
        return f"final_linear.{name}"
    if layout.name == "final_norm":
        return "norm." + _norm_name(name, model.final_norm or model.norm)
    if "layernorm." in name:
        return _norm_name(name, model.norm)
    for pattern, replacement in NEOX_ARCHITECTURES[model.architecture].renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _norm_name(name: str, norm: str) -> str:
    return re.sub(r"weight$", "scale", name) if norm == "rmsnorm" else name
