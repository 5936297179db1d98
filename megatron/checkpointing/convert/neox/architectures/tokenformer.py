"""TokenFormer, as its release (Haiyang-W/TokenFormer, a fork of GPT-NeoX) names it."""

from __future__ import annotations

import re
from typing import Literal

import torch

from megatron.checkpointing.convert.neox.neox_architecture import (
    NEOX_ARCHITECTURES,
    LayerTensors,
    NeoxArchitecture,
    TensorKey,
)
from megatron.config.sections.model import ModelConfig

KEY_TOKENS = re.compile(r"(attention\.(query|proj)|mlp)\.key_param_tokens")


def count_of(pattention: str, section: Literal["qkv", "proj", "ffn"]) -> TensorKey:
    """Returns the key that counts the parameter tokens of one Pattention of a layer."""

    def read(layer: LayerTensors) -> int | None:
        parts = layer.get(f"{pattention}.key_param_tokens")
        if parts is None:
            return None
        first, *others = [part.read() for part in parts]
        # The release keeps whole parameter tokens on every rank; elsewhere ranks hold shares of them.
        if all(torch.equal(first, other) for other in others):
            return len(first)
        return len(first) + sum(map(len, others))

    def configured(model: ModelConfig) -> int | None:
        return None if model.param_tokens is None else getattr(model.param_tokens, section)

    return TensorKey(read, configured)


NEOX_ARCHITECTURES.register("tokenformer")(
    NeoxArchitecture(
        keys={
            "qkv_slot_num": count_of("attention.query", "qkv"),
            "proj_slot_num": count_of("attention.proj", "proj"),
            "ffn_slot_num": count_of("mlp", "ffn"),
        },
        deciding_keys=(
            (r"attention\.(query|key|value)\.", "qkv_slot_num"),
            (r"attention\.proj\.", "proj_slot_num"),
            (r"mlp\.(key|value)_param_tokens", "ffn_slot_num"),
        ),
        is_recognized=lambda layer: any(map(KEY_TOKENS.match, layer)),
        renamed=((r"(key|value)_tokens$", r"\1_param_tokens"),),
    )
)
