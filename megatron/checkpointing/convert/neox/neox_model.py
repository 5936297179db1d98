"""Reads the model off the tensors of a NeoX checkpoint, by YAML key.

The keys of one architecture are in `architectures/`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES, LayerTensors
from megatron.checkpointing.convert.neox.neox_files import NeoxFiles
from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError

EMBEDDING, POSITIONS = "0.word_embeddings.weight", "0.position_embeddings.weight"
FIRST = "2."
"""Prefix of the names in the first transformer layer."""


@dataclass(frozen=True)
class NeoxModel:
    """The part of a model's configuration that follows from names and shapes."""

    settings: dict[str, Any]
    """YAML key to value, without the vocabulary; without the architecture where several have such tensors."""
    architectures: tuple[str, ...]
    """Those that have such tensors."""
    vocabulary_rows: int


def model_of(files: NeoxFiles) -> NeoxModel:
    """Reads the model off names and shapes.

    Raises CheckpointError when these are no tensors of GPT-NeoX, or a layer is missing.
    """
    blocks = sorted(
        {int(match[1]) for name in files.tensors if (match := re.match(r"(\d{1,9})\.(attention|mlp)\.", name))}
    )
    if EMBEDDING not in files.tensors or not blocks:
        names = ", ".join(sorted(files.tensors)[:3])
        raise CheckpointError(
            f"{files.path} does not hold a model of GPT-NeoX or TokenFormer: neither word_embeddings.weight in layer 0 "
            f"nor attention in layer 2, but {names or 'nothing'}."
        )
    # The number of the last layer is the file's: nothing is counted up to it.
    missing = next((number for number, block in enumerate(blocks, start=2) if number != block), None)
    if missing is not None:
        raise CheckpointError(f"{files.path}: transformer layer {missing} is missing. Copy its files as well.")
    embedding = _matrices(files, EMBEDDING, "vocabulary rows")
    first = {name.removeprefix(FIRST): parts for name, parts in files.tensors.items() if name.startswith(FIRST)}
    positions = _matrices(files, POSITIONS, "positions")
    architectures = _architectures_of(first, learned=bool(positions))
    settings: dict[str, Any] = {"architecture": architectures[0]} if len(architectures) == 1 else {}
    settings |= {
        "num_layers": len(blocks),
        "hidden_size": embedding[0].shape[1],
        "no_weight_tying": f"{blocks[-1] + 3}.final_linear.weight" in files.tensors,
        "norm": _norm(files, f"{FIRST}input_layernorm."),
        "final_norm": _norm(files, f"{blocks[-1] + 2}.norm."),
    }
    if settings["norm"] == "layernorm":
        settings["use_bias_in_norms"] = f"{FIRST}input_layernorm.bias" in files.tensors
    if positions:
        settings |= {"pos_emb": "learned", "max_position_embeddings": len(positions[0])}
    own = {name: key.read(first) for name, key in NEOX_ARCHITECTURES[architectures[0]].keys.items()}
    settings |= {name: value for name, value in own.items() if value is not None}
    return NeoxModel(settings, architectures, sum(map(len, embedding)))


def require_same_model(files: NeoxFiles, found: NeoxModel, model: ModelConfig) -> None:
    """Raises ConfigError, by YAML key, when the configuration describes another model than was found."""
    own = NEOX_ARCHITECTURES[found.architectures[0]].keys
    settings = {"architecture": " or ".join(found.architectures)} | found.settings
    is_possible = model.architecture in found.architectures
    configured = {
        "architecture": settings["architecture"] if is_possible else model.architecture,
        "pos_emb": model.pos_emb,
        "max_position_embeddings": model.max_position_embeddings,
        "use_bias_in_norms": model.use_bias_in_norms,
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "no_weight_tying": not model.tie_embeddings,
        "norm": model.norm,
        "final_norm": model.final_norm or model.norm,
    } | {name: key.configured(model) for name, key in own.items()}
    differences = [
        f"{key}: checkpoint {value}, configuration {configured[key]}"
        for key, value in settings.items()
        if value != configured[key]
    ]
    if differences:
        raise ConfigError(
            f"{files.path} holds another model than the configuration describes: {'; '.join(differences)}. Correct the "
            "configuration; the one that NeoX trained with may be in `configs` beside the weights."
        )


def _architectures_of(first: LayerTensors, *, learned: bool) -> tuple[str, ...]:
    """Returns the architecture that claims the tensors of the first layer, or else those with NeoX's own."""
    unclaimed = []
    for name in NEOX_ARCHITECTURES:
        claims = NEOX_ARCHITECTURES[name].is_recognized
        if claims is None:
            unclaimed.append(name)
        elif claims(first):
            return (name,)
    positions = {name: ARCHITECTURES[name].fixed.get("pos_emb") for name in unclaimed}
    return tuple(name for name, fixed in positions.items() if fixed is None or (fixed.value == "learned") is learned)


def _matrices(files: NeoxFiles, name: str, what: str) -> list[Tensor]:
    """Reads the parts of a matrix of the embedding; none where there is no such tensor."""
    parts = [part.read() for part in files.tensors.get(name, ())]
    if any(part.dim() != 2 for part in parts):
        raise CheckpointError(f"{files.path}: {files.describe(name)} is no matrix of {what}.")
    return parts


def _norm(files: NeoxFiles, prefix: str) -> str:
    if f"{prefix}weight" in files.tensors:
        return "layernorm"
    return "rmsnorm" if f"{prefix}scale" in files.tensors else "layernorm_nonparam"
