"""The record that every run leaves: its keys, its numbers, and what happens to it on resume."""

import json
import math
import os
from pathlib import Path

import pytest

from megatron.errors import DataError, EnvironmentSetupError
from megatron.monitor.metrics_file import read_records
from megatron.monitor.metrics_writer import RunEvent
from megatron.monitor.writers.jsonl import JsonlWriter

RECORD = {
    "consumed_tokens": 2**33,
    "train/lm_loss": 0.1 + 0.2,
    "train/learning_rate": 6e-4,
    "train/grad_norm": 1.5,
    "train/tokens_per_second": 1e6,
    "valid/lm_loss": 2.0,
    "valid/perplexity": math.exp(2.0),
}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _strict_json(text: str) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def _write_steps(path: Path, steps: range) -> None:
    writer = JsonlWriter.start(path)
    for step in steps:
        writer.write(step, {"train/lm_loss": 1.0 / step})
    writer.close()


def test_a_row_has_exactly_the_measured_keys_and_loses_no_digit(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter.start(path)
    writer.write(10, RECORD)
    (row,) = _strict_json(path.read_text())  # before close: a killed run has written it
    writer.close()
    assert list(row) == ["iteration", *RECORD]
    assert row == {"iteration": 10, **RECORD}
    assert isinstance(row["consumed_tokens"], int)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter.start(path)
    writer.write(1, {"train/lm_loss": value, "train/grad_norm": 2.0})
    writer.close()
    assert _strict_json(path.read_text()) == [{"iteration": 1, "train/lm_loss": None, "train/grad_norm": 2.0}]


def test_resume_drops_the_rows_that_will_be_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 8))
    before = path.read_text().splitlines()
    writer = JsonlWriter.resume(path, 4)
    writer.write(5, {"train/lm_loss": 0.5})
    writer.close()
    lines = path.read_text().splitlines()
    assert lines[:4] == before[:4]
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3, 4, 5]
    assert _names(tmp_path) == ["metrics.jsonl"]


def test_an_event_is_kept_once_however_often_its_step_is_the_first(tmp_path: Path) -> None:
    """A run that goes on from the event's step marks it again; one that goes on later does not."""
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 4))
    event = RunEvent(3, "growth", "grown", {"operator": "zero_key", "after": {"ffn": 96}})
    for _ in range(2):
        writer = JsonlWriter.resume(path, 3)
        writer.mark(event)
        writer.write(4, {"train/lm_loss": 0.25})
        writer.close()
    JsonlWriter.resume(path, 4).close()
    rows = _strict_json(path.read_text())
    assert [row["iteration"] for row in rows] == [1, 2, 3, 3, 4]
    assert rows[3] == {
        "iteration": 3, "event": "growth", "text": "grown", "operator": "zero_key", "after": {"ffn": 96}
    }  # fmt: skip


@pytest.mark.parametrize("torn", ['{"iteration": 3, "train/lm_l', "\0\0\0\0", '{"iteration": 3, "x": 1.'])
def test_the_torn_last_line_of_a_killed_run_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 3))
    with path.open("a") as file:
        file.write(torn)
    assert [record["iteration"] for record in read_records(path)] == [1, 2]
    writer = JsonlWriter.resume(path, 2)
    writer.write(3, {"train/lm_loss": 0.25})
    writer.close()
    assert [row["iteration"] for row in _strict_json(path.read_text())] == [1, 2, 3]


def test_a_failed_resume_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    _write_steps(path, range(1, 4))
    before = path.read_bytes()

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter.resume(path, 1)
    assert path.read_bytes() == before


def test_resume_without_an_earlier_record_begins_one(tmp_path: Path) -> None:
    JsonlWriter.resume(tmp_path / "metrics.jsonl", 100).close()
    assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"step": 3}', '{"iteration": "3"}'])
def test_a_foreign_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 1}}\n{line}\n{{"iteration": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*Remove the line"):
        JsonlWriter.resume(path, 2)


def test_a_new_run_keeps_what_an_earlier_one_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last in (2, 3, 4):
        _write_steps(path, range(1, last))
    assert _names(tmp_path) == ["metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl"]
    assert [len(read_records(tmp_path / f"metrics.{kept}jsonl")) for kept in ("1.", "2.", "")] == [1, 2, 3]


def test_an_unwritable_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentSetupError, match="log_dir"):
        JsonlWriter.start(tmp_path / "file" / "metrics.jsonl")
