"""Finds what a growth added to a parameter, by the parameter's global name."""

from __future__ import annotations

from megatron.config.sections.growth import GrowthRecord, ModelSizes
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec


def first_new_row(name: str, growth: GrowthRecord) -> int | None:
    """Returns the first row of the parameter `name` that is new; those after it are new as well.

    It is 0 for a parameter of a new layer, and None for one that has nothing new.
    """
    start, _, local = name.partition(".")
    if start != "layers":
        return None
    layer, _, local = local.partition(".")
    if int(layer) in growth.new_layers:
        return 0
    before, after = token_count(local, growth.before), token_count(local, growth.after)
    return None if before == after else before


def local_old_rows(name: str, spec: ParameterSpec, growth: GrowthRecord, context: ParallelContext) -> int:
    """Returns how many rows of this tensor-parallel rank's share of the parameter `name` were there before a growth.

    They are its first ones. A parameter that has nothing new has old rows alone.
    """
    rows = spec.full_shape[0]
    share = rows // context.tensor_size if spec.shard_dim == 0 else rows
    first = context.tensor_rank * share if spec.shard_dim == 0 else 0
    new = first_new_row(name, growth)
    return share if new is None else min(max(new - first, 0), share)


def token_count(local_name: str, sizes: ModelSizes) -> int | None:
    """Returns how many tokens a layer's parameter such as `mlp.key_tokens` has; None for one without tokens."""
    field = token_field(local_name)
    count: int | None = None if field is None else getattr(sizes, field)
    return count


def token_field(local_name: str) -> str | None:
    """Returns the field of the token count of a layer's parameter: `ffn` for `mlp.key_tokens`.

    None for a parameter without tokens.
    """
    *sublayers, kind = local_name.split(".")
    if kind not in ("key_tokens", "value_tokens"):
        return None
    return {"mlp": "ffn", "proj": "proj"}.get(sublayers[-1], "qkv")
