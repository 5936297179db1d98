"""What the tensors of a NeoX checkpoint say of their model, by YAML key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.checkpointing.convert.neox.neox_files import NeoxFiles, StoredTensor
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError

EMBEDDING = "0.word_embeddings.weight"
FIRST = "2."
"""What the names of the first transformer layer begin with."""


@dataclass(frozen=True)
class NeoxModel:
    """The part of a model's configuration that follows from names and shapes."""

    settings: dict[str, Any]
    """YAML key to value, without the vocabulary."""
    vocabulary_rows: int


def model_of(files: NeoxFiles) -> NeoxModel:
    """Read it off. Raises CheckpointError when these are no tensors of GPT-NeoX, or a layer is missing."""
    blocks = sorted({int(match[1]) for name in files.tensors if (match := re.match(r"(\d+)\.(attention|mlp)\.", name))})
    if EMBEDDING not in files.tensors or not blocks:
        names = ", ".join(sorted(files.tensors)[:3])
        raise CheckpointError(
            f"{files.path} does not hold a model of GPT-NeoX or TokenFormer: neither word_embeddings.weight in layer 0 "
            f"nor attention in layer 2, but {names or 'nothing'}."
        )
    missing = sorted(set(range(2, blocks[-1])) - set(blocks))
    if missing:
        raise CheckpointError(f"{files.path}: transformer layer {missing[0]} is missing. Copy its files as well.")
    embedding = [part.read() for part in files.tensors[EMBEDDING]]
    if any(part.dim() != 2 for part in embedding):
        raise CheckpointError(f"{files.path}: {files.describe(EMBEDDING)} is no matrix of vocabulary rows.")
    settings = {
        "architecture": "gpt_neox",
        "num_layers": len(blocks),
        "hidden_size": embedding[0].shape[1],
        "no_weight_tying": f"{blocks[-1] + 3}.final_linear.weight" in files.tensors,
        "norm": _norm(files, f"{FIRST}input_layernorm."),
        "final_norm": _norm(files, f"{blocks[-1] + 2}.norm."),
    }
    tokens = {"qkv_slot_num": "attention.query", "proj_slot_num": "attention.proj", "ffn_slot_num": "mlp"}
    keys = {key: files.tensors.get(f"{FIRST}{where}.key_param_tokens") for key, where in tokens.items()}
    if any(keys.values()):
        settings["architecture"] = "tokenformer"
        settings |= {key: _num_tokens(parts) for key, parts in keys.items() if parts is not None}
    else:
        settings["use_bias_in_attn_linear"] = f"{FIRST}attention.query_key_value.bias" in files.tensors
    return NeoxModel(settings, sum(map(len, embedding)))


def require_same_model(files: NeoxFiles, found: NeoxModel, model: ModelConfig) -> None:
    """Raise ConfigError, by YAML key, when the configuration describes another model than was found."""
    tokens = model.param_tokens
    configured = {
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "no_weight_tying": not model.tie_embeddings,
        "norm": model.norm,
        "final_norm": model.final_norm or model.norm,
        "use_bias_in_attn_linear": model.use_bias_in_attn_linear,
        "qkv_slot_num": tokens and tokens.qkv,
        "proj_slot_num": tokens and tokens.proj,
        "ffn_slot_num": tokens and tokens.ffn,
    }
    differences = [
        f"{key}: checkpoint {value}, configuration {configured[key]}"
        for key, value in found.settings.items()
        if value != configured[key]
    ]
    if differences:
        raise ConfigError(
            f"{files.path} holds another model than the configuration describes: {'; '.join(differences)}. Correct the "
            "configuration; the one that NeoX trained with may be in `configs` beside the weights."
        )


def _norm(files: NeoxFiles, prefix: str) -> str:
    if f"{prefix}bias" in files.tensors:
        return "layernorm"
    return "rmsnorm" if f"{prefix}scale" in files.tensors else "layernorm_nonparam"


def _num_tokens(parts: Sequence[StoredTensor]) -> int:
    """Tokens over all ranks, which hold shares of them or, in the release, all."""
    first, *others = [part.read() for part in parts]
    if all(torch.equal(first, other) for other in others):
        return len(first)
    return len(first) + sum(map(len, others))
