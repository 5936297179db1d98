"""Damaged and hostile records of runs and evaluations: refused by a DataError that names them, or drawn.

Accepted: other numbers of the same kind, rows that lack a measurement, and other names; JSON carries no checksum. What
is drawn has every run's title and axes, whatever stands in the files.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.mutations import FileContent, Findings, damaged_bytes, damaged_json, settings_of
from tools.plots import plot_runs, zero_shot_table

ROWS = [
    {"iteration": step, "consumed_tokens": 100 * step, "train/lm_loss": 5.0 / step, "train/grad_norm": None}
    for step in range(1, 6)
]
RUN = {"name": "a run", "parameters": 1000, "flops_per_token": 6000}
TASKS = {task: {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.4} for task in ("piqa", "hellaswag")}
RESULTS = {
    "results": TASKS,
    "date": "2026-01-02T00:00:00+0000",
    "model": {"name": "mine/global_step10", "parameters": 1000, "manifest_sha256": "ab"},
    "config": {"limit": None, "num_fewshot": 5},
}
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PUBLISHED = "model,parameters,task,metric,value,source\n" + "".join(
    f'Theirs-{size}M,{size}e6,{task},acc,{size / 10:.1f},"their, paper"\n' for size in (125, 350) for task in TASKS
)
DOCUMENTS: dict[str, Any] = {"metrics.jsonl": ROWS[2], "run.json": RUN, "results.json": RESULTS}


@st.composite
def changes(draw: st.DrawFn, name: str) -> bytes:
    """The new content of a file."""
    if name == "published.csv":
        return draw(damaged_bytes(PUBLISHED.encode()))
    if name != "metrics.jsonl":
        return draw(damaged_json(DOCUMENTS[name]) | damaged_bytes(json.dumps(DOCUMENTS[name]).encode()))
    if draw(st.booleans()):
        return draw(damaged_bytes(LINES.encode()))
    lines = LINES.encode().splitlines(keepends=True)
    lines[draw(st.integers(0, len(lines) - 1))] = draw(damaged_json(ROWS[2])) + b"\n"
    return FileContent(b"".join(lines))


def drawn(folder: Path, name: str, x: str) -> str:
    """What the tool that reads a file prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that no font has
        if name in ("results.json", "published.csv"):
            words = ["--published", str(folder / "published.csv"), "--columns", "piqa:acc", "hellaswag:acc"]
            zero_shot_table.main([str(folder / "results.json"), "--output", str(folder / "table"), *words])
        else:
            plot_runs.main([str(folder), "--x", x, "--output", str(folder / "curves.svg")])
    return printed.getvalue()


@pytest.mark.parametrize("name", [*DOCUMENTS, "published.csv"])
@pytest.mark.parametrize("examples", [12, pytest.param(200, marks=pytest.mark.full)])
def test_damaged_records(examples: int, name: str, tmp_path: Path) -> None:
    found = Findings()

    @settings_of(examples)
    @given(changes(name), st.sampled_from(["steps", "tokens", "flops"]))
    def read(content: bytes, x: str) -> None:
        (tmp_path / "metrics.jsonl").write_text(LINES)
        (tmp_path / "run.json").write_text(json.dumps(RUN))
        (tmp_path / "results.json").write_text(json.dumps(RESULTS))
        (tmp_path / "published.csv").write_text(PUBLISHED)
        (tmp_path / name).write_bytes(content)
        printed = found.read(lambda: drawn(tmp_path, name, x), tmp_path)
        if printed is not None:
            found.accept("drawn")
            assert "1 run(s)" in printed or "Average" in printed

    read()
    found.report()


def test_names_that_look_like_formulas_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES)
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"name": "lr $x^ of\n$5\ud800"}))
    assert "1 run(s)" in drawn(tmp_path, "metrics.jsonl", "steps")
    assert "lr $x^ of?$5?" in (tmp_path / "curves.svg").read_text()
    (tmp_path / "published.csv").write_text(PUBLISHED)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"model": {"name": "a$b$\n|", "parameters": 7}}))
    assert "| **a$b$?| (5-shot)** |" in drawn(tmp_path, "results.json", "steps")
