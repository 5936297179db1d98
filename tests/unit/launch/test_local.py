"""Threads of local ranks are shared out unless the user decides."""

from __future__ import annotations

from megatron.launch.local import rank_environment


def test_threads_are_shared_out_unless_the_user_decides() -> None:
    assert rank_environment({"OMP_NUM_THREADS": "3"}, 0, 2, 1)["OMP_NUM_THREADS"] == "3"
    assert int(rank_environment({}, 0, 1000, 1)["OMP_NUM_THREADS"]) == 1
