"""Conversions to the universal form that are damaged, killed or out of room."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.engine import universal
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers.faults import kill_all_ranks
from tests.helpers.layout_runs import SPLIT, LayoutRuns


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
def test_a_damaged_conversion_is_made_again(kind: str, layout_runs: LayoutRuns, half_copy: Path) -> None:
    universal.universal_form(read_checkpoint(half_copy), "full")
    damage(half_copy, kind)
    finished = layout_runs.start(f"damaged-{kind}", (1, 1, 1), SPLIT.model_keys() | {"load": str(half_copy)})
    assert finished.code == 0, finished.output
    assert "It is made again." in finished.output
    layout_runs.assert_continues(f"damaged-{kind}", layout_runs.trained(SPLIT.alone))


def kill_at_layer(number: int) -> None:
    original = universal.Conversion.convert

    def convert(self: Any, layout: Any) -> None:
        if self.done == number:
            kill_all_ranks()
        original(self, layout)

    universal.Conversion.convert = convert  # type: ignore[method-assign]


def test_a_killed_conversion_is_made_again(layout_runs: LayoutRuns, half_copy: Path) -> None:
    keys = SPLIT.model_keys() | {"load": str(half_copy)}
    killed = layout_runs.start("killed", (1, 1, 2), keys, before=kill_at_layer, arguments=(2,))
    assert killed.codes == [-signal.SIGKILL] * 2
    (left,) = half_copy.glob("universal*")
    assert left.name.startswith("universal.writing-")
    assert layout_runs.start("after-kill", (1, 1, 2), keys).code == 0
    layout_runs.assert_continues("after-kill", layout_runs.trained(SPLIT.alone))
    assert sorted(half_copy.glob("universal*")) == [half_copy / "universal", left]
    for path in (left, *left.rglob("*")):
        os.utime(path, (0, 0))
    shutil.rmtree(half_copy / "universal")
    assert layout_runs.start("later", (1, 1, 2), keys).code == 0
    assert list(half_copy.glob("universal*")) == [half_copy / "universal"], "what was abandoned is gone"


def no_room() -> None:
    """Files can grow to a few kilobytes from the moment that the conversion begins."""
    original = universal.Conversion.begin

    def begin(self: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        original(self)

    universal.Conversion.begin = begin  # type: ignore[method-assign]


def test_no_room_for_a_conversion_is_told_on_all_ranks(layout_runs: LayoutRuns, half_copy: Path) -> None:
    finished = layout_runs.start("no-room", (1, 1, 2), SPLIT.model_keys() | {"load": str(half_copy)}, before=no_room)
    assert finished.codes == [1, 1], finished.output
    assert finished.output.count("make room there") == 2
    assert not list(half_copy.glob("universal*"))
