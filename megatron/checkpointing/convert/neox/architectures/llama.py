"""LLaMA as GPT-NeoX saves it, whose matrices of queries, keys and values are one, and in newer versions gate and up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron.checkpointing.convert.neox.neox_architecture import (
    NEOX_ARCHITECTURES,
    GroupedRows,
    LayerTensors,
    NeoxArchitecture,
    NeoxTensors,
    TensorKey,
)
from megatron.checkpointing.convert.neox.neox_files import StoredTensor
from megatron.config.architectures.llama import key_value_heads
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError, ConfigError

PACKED_HEADS = re.compile(r"(\d+\.attention\.)query_key_value\.(weight|bias)")
PACKED_MLP = re.compile(r"(\d+\.mlp\.)linear1\.(weight|bias)")


def is_gated(layer: LayerTensors) -> bool:
    """Tells whether a layer's MLP has a gate: by its older names, or by the rows of the newer ones."""
    if "mlp.w1.weight" in layer:
        return True
    first, second = ([part.read() for part in layer.get(f"mlp.linear{n}.weight", ())] for n in (1, 2))
    matrices = bool(first and second) and first[0].dim() == second[0].dim() == 2
    return matrices and first[0].shape[0] == 2 * second[0].shape[1]


def width_of(layer: LayerTensors) -> int | None:
    """Returns the width inside the MLP; None where no matrix tells it."""
    parts = [part.read() for part in layer.get("mlp.w2.weight") or layer.get("mlp.linear2.weight") or ()]
    return sum(part.shape[1] for part in parts) if parts and all(part.dim() == 2 for part in parts) else None


def take_apart(tensors: NeoxTensors, model: ModelConfig, rows: GroupedRows | None) -> NeoxTensors:
    """Returns the tensors with the packed ones in parts, as `query`, `key`, `value`, `w1` and `w3`.

    With as many heads of keys and values as of queries, and in NeoX's versions whose MLP has w1, w2 and w3, rows are
    packed by head (convert_hf_llama_to_neox.py there); in newer versions, each rank has all its queries, then all its
    keys and values (gqa_project there). Some versions in between have the newer MLP and the older order: `rows` decides
    for these. Raises ConfigError where it has to and is None.
    """
    grouped = key_value_heads(model) != model.num_attention_heads
    if rows is None and grouped and any(PACKED_MLP.fullmatch(name) for name in tensors):
        raise ConfigError(
            "num_kv_heads: versions of GPT-NeoX whose MLP has linear1 and linear2 wrote the rows of query_key_value in "
            "two orders, and the tensors do not tell which. Add --grouped-query-rows by-kind (where gqa_project splits "
            "the projection into queries, keys and values), or by-head (where it first views it by query heads)."
        )
    by_kind = grouped and rows == "by-kind"
    return {name: parts for key, stored in tensors.items() for name, parts in _parts_of(key, stored, model, by_kind)}


def _parts_of(
    name: str, stored: list[StoredTensor], model: ModelConfig, by_kind: bool
) -> Iterator[tuple[str, list[StoredTensor]]]:
    if match := PACKED_HEADS.fullmatch(name):
        for index, ours in enumerate(("query", "key", "value")):
            read = partial(_heads_of, index=index, ranks=len(stored), model=model, by_kind=by_kind)
            yield f"{match[1]}{ours}.{match[2]}", [replace(part, read=partial(read, part)) for part in stored]
    elif match := PACKED_MLP.fullmatch(name):
        # The gate comes second (Gated_Activation there).
        for index, theirs in enumerate(("w3", "w1")):
            yield f"{match[1]}{theirs}.{match[2]}", [replace(part, read=partial(_half, part, index)) for part in stored]
    else:
        yield name, stored


def _heads_of(part: StoredTensor, *, index: int, ranks: int, model: ModelConfig, by_kind: bool) -> Tensor:
    """Returns a rank's queries, keys or values, by their index, from what it packed."""
    packed, head_size = part.read(), model.hidden_size // model.num_attention_heads
    heads, shared = model.num_attention_heads // ranks, key_value_heads(model) // ranks
    sizes = [size * head_size for size in (heads, shared, shared)]
    if not shared or packed.dim() not in (1, 2) or len(packed) != sum(sizes):
        raise CheckpointError(
            f"{part.file}: {part.name} has shape {tuple(packed.shape)}, which is not that of {heads} heads of queries "
            f"and {shared} of keys and values of {head_size} features. `num_kv_heads` decides about it."
        )
    if by_kind:
        return torch.split(packed, sizes)[index]
    if sizes[1] % heads:
        raise CheckpointError(
            f"{part.file}: {part.name} cannot be packed by head: {sizes[1]} rows do not split over {heads} heads."
        )
    by_head = packed.reshape(heads, -1, *packed.shape[1:])
    return torch.split(by_head, [size // heads for size in sizes], dim=1)[index].flatten(0, 1)


def _half(part: StoredTensor, index: int) -> Tensor:
    packed = part.read()
    if packed.dim() not in (1, 2) or len(packed) % 2:
        raise CheckpointError(f"{part.file}: {part.name} has shape {tuple(packed.shape)}, which has no two halves.")
    return torch.chunk(packed, 2)[index]


NEOX_ARCHITECTURES.register("llama")(
    NeoxArchitecture(
        keys={
            "ffn_hidden_size": TensorKey(width_of, lambda model: model.ffn_hidden_size),
            "use_bias_in_attn_linear": TensorKey(
                read=lambda layer: "attention.query_key_value.bias" in layer,
                configured=lambda model: model.use_bias_in_attn_linear,
            ),
            "use_bias_in_mlp": TensorKey(
                read=lambda layer: "mlp.linear1.bias" in layer, configured=lambda model: model.use_bias_in_mlp
            ),
        },
        deciding_keys=(
            (r"attention\.(query|key|value)\.weight", "num_kv_heads"),
            (r"mlp\.w[123]\.weight", "ffn_hidden_size"),
        ),
        is_recognized=is_gated,
        take_apart=take_apart,
        renamed=((r"mlp\.gate\.", "mlp.w1."), (r"mlp\.up\.", "mlp.w3."), (r"mlp\.down\.", "mlp.w2.")),
        also_read=(("mlp.linear2.", "mlp.w2."),),
        row_biases=("attention.dense.bias", "mlp.down.bias"),
        row_biases_are_summed=lambda model: model.parallel_residual,
    )
)
