"""The picture of the packages says what the import contract and the packages' docstrings say."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from tests.helpers.forkserver import ROOT
from tools.plots import draw_architecture


def texts(path: Path) -> list[str]:
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text("utf-8"))]


def test_the_picture_is_current(tmp_path: Path) -> None:
    drawn = tmp_path / "architecture.svg"
    draw_architecture.main(["--output", str(drawn)])
    assert texts(drawn) == texts(ROOT / "docs" / "architecture.svg"), "python tools/plots/draw_architecture.py"


def test_every_package_is_on_a_floor_and_described() -> None:
    packages = {path.parent.name for path in (ROOT / "megatron").glob("*/__init__.py")}
    drawn = {name for floor in draw_architecture.floors() for name in floor}
    assert packages <= drawn
    assert all(draw_architecture.description(name) for name in drawn)
