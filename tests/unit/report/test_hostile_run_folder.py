"""Damaged and hostile files of a run's folder: a report is made of the rest, or a DataError names the folder.

Accepted: whatever leaves the page whole; what is left out is named on it, and no text of the files is a program there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.report.page import build_page
from megatron.report.run_files import read_runs
from tests.helpers.mutations import FileContent, Findings, damaged_bytes, damaged_json, settings_of
from tests.helpers.report_runs import make_run, write_results

JSON_LINES = ("metrics.jsonl", "events.jsonl", "samples.jsonl")
NAMES = (*JSON_LINES, "run.json", "run.yml", "results.json", "global_step20/manifest.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "run", steps=20, every=5)
    write_results(run / "results.json", 20, 0.5)
    return run


@st.composite
def changes(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """The new content of a file."""
    if name == "run.yml" or draw(st.booleans()):
        return draw(damaged_bytes(content))
    if name not in JSON_LINES:
        return draw(damaged_json(json.loads(content)))
    lines = content.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    document: Any = json.loads(lines[place])
    lines[place] = draw(damaged_json(document)) + b"\n"
    return FileContent(b"".join(lines))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.full)])
def test_damaged_files(examples: int, name: str, folder: Path) -> None:
    found, path = Findings(), folder / name
    sound = path.read_bytes()

    @settings_of(examples)
    @given(changes(name, sound))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        runs = found.read(lambda: read_runs([folder], [folder / "results.json"]), folder)
        if runs is not None:
            found.accept("shown")
            text = build_page(runs).html(live_seconds=5.0)
            text.encode()
            assert "<img" not in text
            assert len(re.findall("<h2>Curves</h2>", text)) == 1

    try:
        read()
    finally:
        path.write_bytes(sound)
    found.report()
