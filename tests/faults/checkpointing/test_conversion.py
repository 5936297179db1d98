"""Conversions to the universal form that are damaged, killed or out of room."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.engine import universal
from tests.helpers.configs import TOKENFORMER
from tests.helpers.faults import kill_all_ranks
from tests.helpers.layout_runs import Runs, assert_continues


def damage(half: Path, kind: str) -> None:
    folder = half / "universal"
    moments = next(folder.glob("zero/*/exp_avg.pt"))
    match kind:
        case "a byte":
            content = bytearray(moments.read_bytes())
            content[len(content) // 2] ^= 1
            moments.write_bytes(content)
        case "a file less":
            moments.unlink()
        case "no list":
            (folder / "conversion.json").unlink()
        case "half a list":
            (folder / "conversion.json").write_text((folder / "conversion.json").read_text()[:100])
        case "of something else":
            text = (folder / "conversion.json").read_text()
            source = json.loads(text)["source"]
            (folder / "conversion.json").write_text(text.replace(source, "0" * 64))


@pytest.mark.parametrize(
    "kind",
    [
        "a byte",
        "of something else",
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("a file less", "no list", "half a list")),
    ],
)
def test_a_damaged_conversion_is_made_again(kind: str, runs: Runs, tmp_path: Path) -> None:
    whole = runs.half((2, 1, 1), TOKENFORMER, "tokenformer")
    if not (whole / "universal").exists():
        assert runs.run("makes-it", (1, 1, 1), TOKENFORMER | {"load": str(whole)}).code == 0
    half = tmp_path / whole.name
    shutil.copytree(whole, half)
    damage(half, kind)
    finished = runs.run(f"damaged-{kind}", (1, 1, 1), TOKENFORMER | {"load": str(half)})
    assert finished.code == 0, finished.output
    assert "It is made again." in finished.output
    assert_continues(runs.folder / f"damaged-{kind}", runs.whole(TOKENFORMER, "tokenformer"))


def kill_at_layer(number: int) -> None:
    original = universal.Conversion.convert

    def convert(self: Any, layout: Any) -> None:
        if self.done == number:
            kill_all_ranks()
        original(self, layout)

    universal.Conversion.convert = convert  # type: ignore[method-assign]


def test_a_killed_conversion_is_made_again(runs: Runs, copy: Callable[..., Path]) -> None:
    half = copy((2, 1, 1))
    keys = TOKENFORMER | {"load": str(half)}
    killed = runs.run("killed", (1, 1, 2), keys, before=kill_at_layer, arguments=(2,))
    assert killed.codes == [-signal.SIGKILL] * 2
    (left,) = half.glob("universal*")
    assert left.name.startswith("universal.writing-")
    assert runs.run("after-kill", (1, 1, 2), keys).code == 0
    assert_continues(runs.folder / "after-kill", runs.whole(TOKENFORMER, "tokenformer"))
    assert sorted(half.glob("universal*")) == [half / "universal", left]
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, 0))
    shutil.rmtree(half / "universal")
    assert runs.run("later", (1, 1, 2), keys).code == 0
    assert list(half.glob("universal*")) == [half / "universal"], "what was abandoned is gone"


def no_room() -> None:
    """Files can grow to a few kilobytes from the moment that the conversion begins."""
    original = universal.Conversion.begin

    def begin(self: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        original(self)

    universal.Conversion.begin = begin  # type: ignore[method-assign]


def test_no_room_for_a_conversion_is_told_on_all_ranks(runs: Runs, copy: Callable[..., Path]) -> None:
    half = copy((2, 1, 1))
    finished = runs.run("no-room", (1, 1, 2), TOKENFORMER | {"load": str(half)}, before=no_room)
    assert finished.codes == [1, 1], finished.output
    assert finished.output.count("make room there") == 2
    assert not list(half.glob("universal*"))
