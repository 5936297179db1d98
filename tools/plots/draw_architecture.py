"""Draws the packages by floor, and the way of one batch through them: docs/architecture.svg.

    python tools/plots/draw_architecture.py [--output docs/architecture.svg]

Floors come from the contract in pyproject.toml that `make checks` holds the imports to, words from the packages' own
docstrings; so the picture says what is so. A test compares it with the file.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path

from megatron_tokenformer import run_tool

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from megatron.config.local_path import local_path
from tools.command_line import tool_parser
from tools.plots.themed_svg import save_svg

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "docs" / "architecture.svg"
PACKAGE = "megatron"
SCRIPTS = ("deepy.py  train.py  eval.py  generate.py  tools/", "Commands: what a user types.")
FLOOR_COLOURS = ("#f3ece1", "#e4eef6")
BOX, ROOM, EDGE, BATCH = "#ffffff", "#f7f7f5", "#8a8a8a", "#c2410c"
INK, WORDS = "#222222", "#555555"
LETTERS_PER_UNIT = 1.8
NARROW = 18.0
"""Width under which rooms are a line of names [percent of the picture]."""
ONE_BATCH = (
    ("data", "a micro batch of token ids, in NeoX's order"),
    ("training", "the loop hands it to DeepSpeed's pipeline engine"),
    ("model", "embedding, layers, final norm, head, loss"),
    ("kernels", "Pattention and attention, forward and backward"),
    ("mpu", "sums over tensor-parallel ranks"),
    ("checkpointing", "now and then, the state goes to disk"),
    ("monitor", "loss and throughput are recorded"),
)
"""Packages in the order in which one batch meets them."""


def main(argv: Sequence[str]) -> int:
    """Draws the picture."""
    parser = tool_parser(__doc__)
    parser.add_argument("--output", type=local_path, default=OUTPUT, help="file to write (docs/architecture.svg)")
    options = parser.parse_args(argv)
    save_svg(draw, options.output)
    return 0


def floors() -> list[list[str]]:
    """Reads the floors from the import contract, the highest first; packages without code are left out."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"].startswith("Floors"))
    names = [re.findall(rf"{PACKAGE}\.(\w+)", layer) for layer in layers]
    there = [[name for name in floor if description(name) is not None] for floor in names]
    return [floor for floor in there if floor]


def description(name: str) -> str | None:
    """Returns the first line of a package's or module's docstring; None when there is no such package."""
    for path in (ROOT / PACKAGE / name / "__init__.py", ROOT / PACKAGE / f"{name}.py"):
        if path.is_file():
            return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0]
    return None


def rooms(name: str) -> list[tuple[str, str]]:
    """Lists a package's own packages with the first lines of their docstrings."""
    folders = sorted(path.parent.name for path in (ROOT / PACKAGE / name).glob("*/__init__.py"))
    return [(folder, description(f"{name}/{folder}") or "") for folder in folders]


def draw() -> Figure:
    """Draws all floors, the scripts on top."""
    rows = [[SCRIPTS], *[[(name, description(name) or "") for name in floor] for floor in merged(floors())]]
    heights = [1.3 if any(rooms(name) for name, _ in packages) else 0.8 for packages in rows]
    total = sum(heights)
    figure = Figure(figsize=(13.5, total + 1.4))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 100)
    axes.set_ylim(-1.0, total + 0.4)
    axes.set_axis_off()
    numbers = {name: number for number, (name, _) in enumerate(ONE_BATCH, start=1)}
    top = total
    for row, (packages, height) in enumerate(zip(rows, heights, strict=True)):
        top -= height
        axes.axhspan(top, top + height, color=FLOOR_COLOURS[row % 2], zorder=0)
        axes.text(
            1.4, top + height / 2, str(len(rows) - 1 - row), fontsize=15, color="#8a8a8a", va="center", ha="center"
        )
        width = 96.0 / len(packages)
        for place, (name, words) in enumerate(packages):
            draw_package(
                axes, (3.0 + place * width, top + 0.08, width - 1.0, height - 0.16), name, words, numbers.get(name)
            )
    axes.text(3.0, total + 0.14, "A file imports its own package or a lower floor.", fontsize=11, color=WORDS)
    axes.text(3.0, -0.2, "One batch", fontsize=11, fontweight="bold", color=BATCH, va="center")
    for number, (_, words) in enumerate(ONE_BATCH, start=1):
        column, line = divmod(number - 1, 3)
        axes.text(
            13.0 + 30.0 * column, -0.2 - 0.26 * line, f"{number}  {words}", fontsize=9.5, color=BATCH, va="center"
        )
    return figure


def merged(rows: list[list[str]]) -> list[list[str]]:
    """Joins the single modules at the bottom to one floor: they import nothing but the standard library."""
    modules = [name for row in rows for name in row if (ROOT / PACKAGE / f"{name}.py").is_file()]
    return [row for row in rows if not set(row) & set(modules)] + [modules]


def draw_package(
    axes: Axes, place: tuple[float, float, float, float], name: str, words: str, number: int | None
) -> None:
    """Draws a package at (left, bottom, width, height), with its rooms and the number of the batch's step."""
    x, y, width, height = place
    _box(axes, place, BOX, EDGE)
    top = y + height
    axes.text(x + 0.8, top - 0.17, name, fontsize=12, fontweight="bold", color=INK, va="center")
    lines = textwrap.wrap(words, width=int(width * LETTERS_PER_UNIT), break_on_hyphens=False)[:3]
    axes.text(x + 0.8, top - 0.32, "\n".join(lines), fontsize=8.8, color=WORDS, va="top", linespacing=1.25)
    if number is not None:
        circle = {"boxstyle": "circle,pad=0.25", "fc": BATCH, "ec": "none"}
        place_of_number = (x + width - 1.3, top - 0.17)
        axes.text(*place_of_number, str(number), bbox=circle, fontsize=9, color=BOX, va="center", ha="center")
    inner = rooms(name)
    step = (width - 1.2) / max(len(inner), 1)
    if step < NARROW:
        names = textwrap.wrap(" · ".join(room for room, _ in inner), width=int(width * LETTERS_PER_UNIT * 1.05))
        axes.text(x + 0.8, y + 0.08, "\n".join(names), fontsize=8.2, style="italic", color=WORDS, va="bottom")
        return
    for index, (room, what) in enumerate(inner):
        left = x + 0.8 + index * step
        _box(axes, (left, y + 0.06, step - 0.4, 0.5), ROOM, "#b5b5b5")
        axes.text(left + 0.4, y + 0.44, room, fontsize=8.6, fontweight="bold", color=WORDS, va="center")
        lines = textwrap.wrap(what, width=int(step * LETTERS_PER_UNIT * 1.12), break_on_hyphens=False)[:2]
        text = "\n".join(lines)
        axes.text(left + 0.4, y + 0.34, text, fontsize=7.6, color=WORDS, va="top", linespacing=1.2)


def _box(axes: Axes, place: tuple[float, float, float, float], face: str, edge: str) -> None:
    x, y, width, height = place
    style = "round,pad=0,rounding_size=0.5"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, mutation_aspect=0.09, fc=face, ec=edge, lw=0.9)
    )


if __name__ == "__main__":
    run_tool(main)
