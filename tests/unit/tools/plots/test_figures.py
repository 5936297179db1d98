"""Figures of the documentation are what their scripts draw, and can be read on light and dark pages."""

from __future__ import annotations

import re
from html import unescape
from itertools import product
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tests.helpers.forkserver import ROOT
from tools.plots import draw_pattention
from tools.plots.themed_svg import DARK, save_svg

DOCS = ROOT / "docs"
FIGURES = ("architecture", *draw_pattention.FIGURES)
FACES, WORDS = {"#ffffff", "#f7f7f5", "#f3ece1", "#e4eef6", "#fde4d3", "#d5e5f6", "#d6eedf"}, {"#222222", "#555555"}
CONTRAST = 4.5
"""Of text with its background, as WCAG 2.2 asks for (AA)."""


def luminance(colour: str) -> float:
    shares = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * shares[0] + 0.7152 * shares[1] + 0.0722 * shares[2]


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def texts(path: Path) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8"))]


def test_the_figures_are_current(tmp_path: Path) -> None:
    draw_pattention.main(["--output_dir", str(tmp_path)])
    for name in draw_pattention.FIGURES:
        assert texts(tmp_path / f"{name}.svg") == texts(DOCS / f"{name}.svg"), "python tools/plots/draw_pattention.py"


@pytest.mark.parametrize("name", FIGURES)
def test_every_colour_of_a_figure_has_a_dark_one(name: str) -> None:
    svg = (DOCS / f"{name}.svg").read_text("utf-8")
    style, _, drawing = svg.partition("</style>")
    colours = {(what, colour) for what, colour in re.findall(r"(fill|stroke): (#[0-9a-f]{6})", drawing)}
    assert colours
    for what, colour in colours:
        assert f'[style*="{what}: {colour}"]{{{what}:{DARK[colour]}!important}}' in style


@pytest.mark.parametrize("words", sorted(WORDS))
def test_words_stand_out_on_either_page(words: str) -> None:
    for face, dark in product(FACES, (False, True)):
        shown = (DARK[words], DARK[face]) if dark else (words, face)
        assert contrast(*shown) >= CONTRAST, (shown, face)


def test_a_colour_without_a_dark_one_is_refused(tmp_path: Path) -> None:
    def draw() -> Figure:
        return Figure(facecolor="#123456")

    with pytest.raises(ValueError, match="#123456 have no dark colour"):
        save_svg(draw, tmp_path / "figure.svg")
