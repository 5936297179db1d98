"""Lays out what a growth changes, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby

from megatron.checkpointing.states.parameter_layout import LayerLayout, layer_layouts
from megatron.config.token_share import TOKEN_KEYS
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth

COLUMNS = ("layers", "made of", "q, k, v tokens", "proj tokens", "ffn tokens", "parameters each", "new rows each")


def growth_table(growth: Growth) -> list[str]:
    """Returns the lines of a table: sizes before and after, parameters, new rows; equal layers share a line.

    New rows are those of all tensors of a layer. A layer that is new says what stood in its place.
    """
    rows = [COLUMNS, *_rows(growth)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _rows(growth: Growth) -> Iterator[tuple[str, ...]]:
    before = {layout.name: layout for layout in layer_layouts(growth.before, growth.vocab)}
    operator, rules = GROWTH_OPERATORS[growth.rules.operator], growth.rules
    sources = operator.source_layers(growth.before.num_layers, growth.after.num_layers, rules)
    lines = []
    for layout in layer_layouts(growth.after, growth.vocab):
        stack, _, number = layout.name.partition(".")
        source = f"{stack}.{sources[int(number)]}" if number else layout.name
        is_new = bool(number) and int(number) in growth.record.new_layers
        made_of = "" if source == layout.name and not is_new else f"new ({source})" if is_new else source
        lines.append((layout.name, made_of, *_sizes(growth, before[source], layout)))
    for cells, group in groupby(lines, key=lambda line: line[1:]):
        names = [line[0] for line in group]
        yield (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", *cells)


def _sizes(growth: Growth, before: LayerLayout, after: LayerLayout) -> tuple[str, ...]:
    counts = [
        _change(getattr(growth.record.before, field), getattr(growth.record.after, field))
        if after.name.startswith("layers.")
        else ""
        for field in TOKEN_KEYS
    ]
    new_rows = 0
    for local, spec in after.parameters.items():
        first = growth.first_new_row(after.global_name(local))
        new_rows += 0 if first is None else spec.full_shape[0] - first
    return (*counts, _change(_parameters(before), _parameters(after)), f"{new_rows:,}")


def _parameters(layout: LayerLayout) -> int:
    return sum(math.prod(spec.full_shape) for spec in layout.parameters.values())


def _change(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    return f"{before:,}" if before == after else f"{before:,} > {after:,}"
