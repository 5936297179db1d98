"""The log of a run's events keeps all that happened, and never ends a run."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from megatron.monitor.event_log import EventLog, read_events
from megatron.monitor.metrics_writer import RunEvent


def test_events_are_read_as_they_were_noted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    log.note(RunEvent(0, "start", "from https://me:secret@store.example/run", {"ranks": 2}))
    log.note(RunEvent(7, "save", "saved global_step7", {}))
    EventLog(tmp_path / "run").note(RunEvent(3, "resume", "going on", {}))
    events, damaged = read_events(tmp_path / "run" / "events.jsonl")
    assert [(event["event"], event["iteration"]) for event in events] == [("start", 0), ("save", 7), ("resume", 3)]
    assert events[0]["ranks"] == 2
    assert events[0]["text"] == "from https://<redacted>@store.example/run"
    assert damaged == []
    times = [datetime.fromisoformat(event["time"]) for event in events]
    assert times == sorted(times)
    assert abs(datetime.now(UTC) - times[-1]) < timedelta(minutes=10)


def test_a_removed_log_is_made_again_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.note(RunEvent(0, "start", "", {}))
    (tmp_path / "events.jsonl").unlink()
    log.note(RunEvent(5, "end", "", {}))
    assert [event["iteration"] for event in read_events(tmp_path / "events.jsonl")[0]] == [0, 5]


def test_a_log_that_cannot_be_written_is_told_of_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        EventLog(tmp_path / "file").note(RunEvent(0, "start", "what is lost", {}))
    assert "events.jsonl: cannot be written" in caplog.text
    assert "what is lost" in caplog.text


def test_lines_that_are_no_events_are_named(tmp_path: Path) -> None:
    sound = {"time": "2026-01-02T03:04:05+00:00", "event": "save", "iteration": 4, "text": ""}
    wrong = [
        sound | {"time": "yesterday"},
        sound | {"time": "2026-01-02"},
        sound | {"iteration": "4"},
        {"event": "save"},
    ]
    lines = [json.dumps(line) for line in (sound, *wrong)]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines, "{torn"]))
    events, damaged = read_events(tmp_path / "events.jsonl")
    assert events == [sound]
    assert [sentence.split(": ")[0].rpartition(":")[2] for sentence in damaged] == ["2", "3", "4", "5", "6"]
