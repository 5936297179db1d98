"""Draws the figures of docs/arithmetic.md: Pattention, its split over two ranks, and its growth.

    python tools/plots/draw_pattention.py [--output_dir docs]

A matrix is a rectangle, and its axes are named on its edges. The axis of parameter tokens, the one that a layer's input
and output do not have, is orange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tokenformer import run_tool

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from megatron.config.local_path import local_path
from tools.command_line import tool_parser
from tools.plots.themed_svg import save_svg

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAPER, INK, FAINT, EDGE = "#ffffff", "#222222", "#555555", "#b5b5b5"
PLAIN = ("#f7f7f5", "#8a8a8a")
TOKENS = ("#fde4d3", "#c2410c")
RANKS = (("#d5e5f6", "#1d5fa8"), ("#d6eedf", "#2f7d4f"))
WIDTH = 6.0
"""Width of every figure [inch]: on a telephone, letters of 11 points are still as large as a footnote's."""
NAME, LABEL, WORDS = 15.0, 11.0, 11.0
"""Sizes of letters [points]."""


@dataclass(frozen=True)
class Box:
    """A rectangle by its lower left corner and its size, in units of a hundredth of the figure's width."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> tuple[float, float]:
        """Returns the centre."""
        return self.x + self.width / 2, self.y + self.height / 2


def main(argv: Sequence[str]) -> int:
    """Draws all figures into a folder."""
    parser = tool_parser(__doc__)
    parser.add_argument("--output_dir", type=local_path, default=DOCS, help="folder to write to (docs)")
    options = parser.parse_args(argv)
    for name, draw in FIGURES.items():
        save_svg(draw, options.output_dir / f"{name}.svg")
    return 0


def draw_pattention() -> Figure:
    """Draws the two products of a Pattention, with Theta between them."""
    figure, axes = _canvas(70)
    _say(axes, (2, 66.5), "scores of S input tokens with n parameter tokens", align="left")
    _matrix(axes, Box(6, 43, 18, 14), "X", left="S", top="D")
    _matrix(axes, Box(37, 41, 22, 18), "Kᵀ", left="D", top="n", top_is_tokens=True)
    _matrix(axes, Box(74, 43, 22, 14), "A", left="S", top="n", top_is_tokens=True)
    _matrix(axes, Box(6, 7, 22, 14), "H", left="S", top="n", top_is_tokens=True)
    _matrix(axes, Box(42, 3, 16, 22), "V", left="n", top="N", left_is_tokens=True)
    _matrix(axes, Box(74, 7, 16, 14), "Y", left="S", top="N")
    for place, sign in (((29, 50), "·"), ((66, 50), "="), ((33.5, 14), "·"), ((65, 14), "=")):
        _say(axes, place, sign, size=20)
    bend = "angle,angleA=-90,angleB=180,rad=6"
    axes.add_patch(FancyArrowPatch((85, 42), (17, 31), arrowstyle="-", connectionstyle=bend, color=TOKENS[1], lw=1.4))
    axes.add_patch(FancyArrowPatch((17, 31.5), (17, 25), arrowstyle="-|>", mutation_scale=12, color=TOKENS[1], lw=1.4))
    _say(axes, (50, 34), "H = Θ(A), row by row", colour=TOKENS[1])
    return figure


def draw_split() -> Figure:
    """Draws a Pattention on two tensor-parallel ranks, and what they exchange."""
    figure, axes = _canvas(98)
    for rank, left in enumerate((4, 54)):
        colours = RANKS[rank]
        _say(axes, (left + 21, 95), f"rank {rank}", colour=colours[1], bold=True)
        _matrix(axes, Box(left + 2, 79, 14, 11), "X", left="S", top="D")
        _matrix(
            axes, Box(left + 26, 78, 16, 12), f"K{'₀₁'[rank]}ᵀ", left="D", top="n / 2", fill=colours, top_is_tokens=True
        )
        _matrix(axes, Box(left + 13, 57, 16, 11), f"A{'₀₁'[rank]}", left="S", top="n / 2", fill=colours)
        _down(axes, left + 21, 77, 71.5)
        _down(axes, left + 21, 57, 52.2)
        _down(axes, left + 10, 45.6, 42.0)
        _matrix(axes, Box(left + 1.5, 27, 16, 11), f"H{'₀₁'[rank]}", left="S", top="n / 2", fill=colours)
        _matrix(axes, Box(left + 28, 24.5, 14, 16), f"V{'₀₁'[rank]}", left="n / 2", top="N", fill=colours)
        _down(axes, left + 21, 23.6, 19.2)
    _band(axes, Box(4, 45.8, 92, 6.2), "sum over ranks of Σ a²: S numbers", bold=True)
    _band(axes, Box(4, 12.6, 92, 6.2), "sum over ranks of H₀ V₀ + H₁ V₁: Y, S N numbers", bold=True)
    _say(axes, (50, 7.6), "backward: the sum of ⟨q, u⟩, again S numbers,", colour=FAINT)
    _say(axes, (50, 3.4), "and of the gradient of X, S D numbers", colour=FAINT)
    return figure


def draw_growth() -> Figure:
    """Draws zero keys and drawn values that are appended to a Pattention, and what the scores are then."""
    figure, axes = _canvas(66)
    _matrix(axes, Box(7, 30, 18, 22), "K", left="n", top="D", left_is_tokens=True)
    _matrix(axes, Box(7, 19, 18, 10), "0", left="m", fill=RANKS[0], left_is_tokens=True)
    _matrix(axes, Box(39, 30, 18, 22), "V", left="n", top="N", left_is_tokens=True)
    _matrix(axes, Box(39, 19, 18, 10), "drawn", left="m", fill=RANKS[0], left_is_tokens=True, size=11.5)
    _say(axes, (2, 62), "m tokens are appended; D and N stay", align="left")
    for row, (name, old, new) in enumerate((("a", "as before", "0"), ("h", "as before", "gelu(0) = 0"))):
        y = 45 - 15 * row
        _say(axes, (65.5, y + 3), name, size=NAME, italic=True)
        _row(axes, Box(68, y, 15, 6), old, TOKENS)
        _row(axes, Box(83, y, 15, 6), new, RANKS[0])
        _say(axes, (75.5, y + 8.4), "n", colour=TOKENS[1], italic=True)
        _say(axes, (90.5, y + 8.4), "m", colour=RANKS[0][1], italic=True)
    _down(axes, 83, 44.2, 38.8)
    _say(axes, (83, 22.5), "‖a‖ and s as before,", colour=INK)
    _say(axes, (83, 18.2), "so y as before", colour=INK)
    _say(axes, (50, 10), "first step: the new keys have gradients;", colour=FAINT)
    _say(axes, (50, 5.6), "second step: the new values too", colour=FAINT)
    return figure


FIGURES: Mapping[str, Callable[[], Figure]] = {
    "pattention": draw_pattention,
    "pattention_split": draw_split,
    "pattention_growth": draw_growth,
}
"""Figures by the names of their files."""


def _canvas(height: float) -> tuple[Figure, Axes]:
    """Makes a figure of 100 by `height` units."""
    figure = Figure(figsize=(WIDTH, WIDTH * height / 100), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    return figure, axes


def _matrix(
    axes: Axes,
    box: Box,
    name: str,
    *,
    left: str = "",
    top: str = "",
    fill: tuple[str, str] | None = None,
    left_is_tokens: bool = False,
    top_is_tokens: bool = False,
    size: float = NAME,
) -> None:
    """Draws a matrix with its name inside and its axes outside, on its left and its top edge."""
    holds_tokens = left_is_tokens or top_is_tokens
    face, edge = fill or (TOKENS if holds_tokens else PLAIN)
    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=face, edgecolor=edge, lw=1.2))
    _say(axes, box.middle, name, size=size, italic=True)
    colour = TOKENS[1] if fill is None else edge
    _say(
        axes,
        (box.x - (1.0 if len(left) > 1 else 2.0), box.middle[1]),
        left,
        colour=colour if left_is_tokens else FAINT,
        italic=True,
        size=LABEL,
        align="right" if len(left) > 1 else "center",
    )
    _say(
        axes,
        (box.middle[0], box.y + box.height + 2.0),
        top,
        colour=colour if top_is_tokens else FAINT,
        italic=True,
        size=LABEL,
    )


def _row(axes: Axes, box: Box, words: str, fill: tuple[str, str]) -> None:
    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=fill[0], edgecolor=fill[1], lw=1.2))
    _say(axes, box.middle, words, size=9.5)


def _band(axes: Axes, box: Box, words: str, *, bold: bool = False) -> None:
    """Draws an exchange between ranks, across all of them."""
    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=TOKENS[0], edgecolor=TOKENS[1], lw=1.2))
    _say(axes, box.middle, words, bold=bold)


def _down(axes: Axes, x: float, top: float, bottom: float) -> None:
    axes.add_patch(FancyArrowPatch((x, top), (x, bottom), arrowstyle="-|>", mutation_scale=11, color=EDGE, lw=1.4))


def _say(
    axes: Axes,
    place: tuple[float, float],
    words: str,
    *,
    size: float = WORDS,
    colour: str = INK,
    align: Any = "center",
    italic: bool = False,
    bold: bool = False,
) -> None:
    axes.text(
        *place, words, fontsize=size, color=colour, ha=align, va="center",
        style="italic" if italic else "normal", weight="bold" if bold else "normal",
    )  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
