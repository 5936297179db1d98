"""deepy.py: what it refuses, and how it looks after several ranks."""

from __future__ import annotations

import deepy


def test_threads_are_shared_out_unless_the_user_decides() -> None:
    assert deepy.rank_environment({"OMP_NUM_THREADS": "3"}, 0, 2, 1)["OMP_NUM_THREADS"] == "3"
    assert int(deepy.rank_environment({}, 0, 1000, 1)["OMP_NUM_THREADS"]) == 1
