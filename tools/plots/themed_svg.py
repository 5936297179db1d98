"""SVG files of the documentation's figures: text stays text, equal figures are equal files, and dark pages are dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

DARK: Mapping[str, str] = {
    "#ffffff": "#1b1d20",
    "#f7f7f5": "#25282c",
    "#f3ece1": "#2c2823",
    "#e4eef6": "#212a33",
    "#222222": "#e6e6e6",
    "#555555": "#b4b4b4",
    "#8a8a8a": "#8f8f8f",
    "#b5b5b5": "#5a5f66",
    "#c2410c": "#f59e5b",
    "#fde4d3": "#5b3218",
    "#1d5fa8": "#7fb4ee",
    "#d5e5f6": "#1d3a5c",
    "#2f7d4f": "#74c796",
    "#d6eedf": "#1c4630",
}
"""Colours that a figure may have on a light page, and what each becomes on a dark one."""
FONT = "DejaVu Sans"


def save_svg(draw: Callable[[], Figure], path: Path) -> None:
    """Writes the figure that `draw` makes.

    A browser shows it in the colours of DARK where its reader prefers dark pages, background included, so that it
    can be read on any page; other programs show it as drawn. Raises ValueError for a colour that has no dark one.
    """
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron", "font.family": FONT}):
        draw().savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    if strange := sorted(drawn - DARK.keys()):
        raise ValueError(f"{path}: {', '.join(strange)} have no dark colour in DARK")
    rules = [
        f'[style*="{what}: {light}"]{{{what}:{DARK[light]}!important}}'
        for light in sorted(drawn)
        for what in ("fill", "stroke")
    ]
    dark = "@media (prefers-color-scheme: dark){" + "".join(rules) + "}"
    # A browser gives text without a colour of its own black.
    dark = dark.removesuffix("}") + f"text:not([style*=fill]){{fill:{DARK['#222222']}}}}}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg.replace("</style>", f"{dark}</style>", 1), encoding="utf-8")
