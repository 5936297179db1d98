"""Progress is reported once in a while."""

from __future__ import annotations

import pytest

from megatron.io import progress
from megatron.io.progress import PeriodicReport


def test_messages_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.5, 9.0, 10.4, 10.6])
    monkeypatch.setattr(progress, "monotonic", lambda: next(now))
    said: list[tuple[object, ...]] = []
    report = PeriodicReport(lambda *message: said.append(message), seconds=5.0)
    for done in range(1, 6):
        report("%d done", done)
    assert said == [("%d done", 2), ("%d done", 5)]
