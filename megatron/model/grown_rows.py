"""Rows of each parameter that were there before a growth, whole and on a tensor-parallel rank.

Growth appends: the first rows of the larger parameter are the smaller one's. A layer that is new has no old rows.
"""

from __future__ import annotations

import re

from megatron.config.sections.growth import GrowthRecord
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec

_TOKENS = {
    re.compile(r"layers\.\d+\.attention\.(query|key|value)\.(key|value)_tokens"): "qkv",
    re.compile(r"layers\.\d+\.attention\.proj\.(key|value)_tokens"): "proj",
    re.compile(r"layers\.\d+\.mlp\.(key|value)_tokens"): "ffn",
}
"""Global names of parameters with a row per parameter token, and the size that counts these."""


def old_rows(name: str, spec: ParameterSpec, record: GrowthRecord) -> int:
    """Returns how many of the first rows of the whole parameter `name` are older than the growth."""
    kind, _, rest = name.partition(".")
    if kind == "layers" and int(rest.partition(".")[0]) in record.new_layers:
        return 0
    for pattern, size in _TOKENS.items():
        if pattern.fullmatch(name):
            before: int | None = getattr(record.before, size)
            return spec.full_shape[0] if before is None else before
    return spec.full_shape[0]


def local_old_rows(name: str, spec: ParameterSpec, record: GrowthRecord, context: ParallelContext) -> int:
    """Returns how many of the first rows of this tensor-parallel rank's share of `name` are older than the growth."""
    whole = old_rows(name, spec, record)
    if spec.shard_dim != 0:
        return whole
    share = spec.full_shape[0] // context.tensor_size
    return min(max(whole - context.tensor_rank * share, 0), share)
