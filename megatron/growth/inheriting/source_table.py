"""Lays out where every tensor of an inheriting model comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from megatron.growth.inheriting.inherit_operator import Inheritance

COLUMNS = ("tensor", "shape", "made of", "of it")


@dataclass(frozen=True)
class _Line:
    """A tensor of a layer; equal lines of neighboring layers are shown as one."""

    local: str
    shape: str
    source: str
    kept: str


def source_table(inheritance: Inheritance) -> list[str]:
    """Returns the lines of a table that names every tensor, with its source, and the layers that are left out.

    Tensors of neighboring layers whose sources are neighbors in the same order share a line, as in
    `layers.{0..11}.mlp.key_tokens`.
    """
    rows = [COLUMNS, *_rows(inheritance)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    unused = sorted(set(range(inheritance.before.num_layers)) - set(_used_layers(inheritance)))
    return [*lines, f"layers of the reference that are left out: {_ranges(unused) or 'none'}"]


def _used_layers(inheritance: Inheritance) -> Iterator[int]:
    for layer, source in enumerate(inheritance.source_layers):
        locals_ = inheritance.reference_layouts[f"layers.{source}"].parameters
        if any(inheritance.is_inherited(f"layers.{layer}", local) for local in locals_):
            yield source


def _rows(inheritance: Inheritance) -> Iterator[tuple[str, ...]]:
    names = [layout.name for layout in inheritance.layouts]

    def distance(name: str) -> int | str:
        """Tells how far above its source a layer stands, the same for neighbors that share lines."""
        _, _, number = name.partition(".")
        return int(number) - inheritance.source_layers[int(number)] if number else name

    for _, group in groupby(names, key=distance):
        members = list(group)
        sources = [inheritance.source(name) for name in members]
        for line in _lines(inheritance, members[0]):
            source = f"{_joined(sources)}.{line.local}" if line.source == "reference" else line.source
            yield (f"{_joined(members)}.{line.local}", line.shape, source, line.kept)


def _lines(inheritance: Inheritance, name: str) -> Iterator[_Line]:
    layout = next(layout for layout in inheritance.layouts if layout.name == name)
    for local, spec in layout.parameters.items():
        shape = " x ".join(map(str, spec.full_shape))
        if inheritance.is_inherited(name, local):
            cuts = [str(cut) for cut in inheritance.cuts(name, local) if cut is not None]
            yield _Line(local, shape, "reference", ", ".join(cuts) or "all")
        else:
            yield _Line(local, shape, f"initial values, seed {inheritance.seed}", "")


def _joined(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    stack, first, last = names[0].partition(".")[0], names[0].partition(".")[2], names[-1].partition(".")[2]
    return f"{stack}.{{{first}..{last}}}"


def _ranges(numbers: list[int]) -> str:
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)
