"""The rank to blame for a hang, from what ranks have told of themselves."""

from __future__ import annotations

import pytest

from megatron.mpu.collective_trace import Channel, OpenOperation
from megatron.training.hangs.rank_state import RankState
from megatron.training.hangs.verdict import find_verdict


def state(rank: int, channels: dict[str, Channel], waits_in: str | None = None, phase: str = "step 41") -> RankState:
    opened = None
    if waits_in is not None:
        channel = channels[waits_in]
        opened = OpenOperation(waits_in, channel.operation, channel.begun, 303.0)
    return RankState(
        rank,
        f"node{rank}",
        100 + rank,
        7,
        "2026-01-02 03:04:05",
        41,
        phase,
        False,
        305.0,
        "a.py:1 in f",
        channels,
        opened,
    )


def channel(begun: int, *ranks: int, operation: str = "all_reduce") -> Channel:
    return Channel(ranks, begun, begun, operation)


def test_the_silent_rank_is_named_with_what_it_told_last() -> None:
    waiting = state(0, {"world": channel(12, 0, 1)}, waits_in="world")
    stopped = state(1, {"world": channel(9, 0, 1)}, phase="step 40")
    verdict = find_verdict({0: waiting}, {1: stopped})
    assert verdict.blamed == (1,)
    assert verdict.lines[0].startswith("rank 1 (node1, process 101) is silent")
    assert "told last at 2026-01-02 03:04:05 UTC, in step 40" in verdict.lines[0]
    assert (
        "rank 0 (node0, process 100) is in step 41, in all_reduce, operation 12 of ranks 0, 1, for 303 s"
        in (verdict.lines[1])
    )


def test_a_rank_that_never_told_anything_is_silent_too() -> None:
    verdict = find_verdict({0: state(0, {"world": channel(1, 0, 1)}, waits_in="world")}, {1: None})
    assert verdict.blamed == (1,)
    assert verdict.lines[0] == "rank 1 is silent, and has never told anything."


def test_the_end_of_a_chain_is_to_blame() -> None:
    """Rank 2 waits for 0, which waits for 1, which waits for nobody."""
    answers = {
        0: state(0, {"data": channel(4, 0, 2), "tensor": channel(30, 0, 1)}, waits_in="tensor"),
        1: state(1, {"tensor": channel(29, 0, 1)}),
        2: state(2, {"data": channel(5, 0, 2)}, waits_in="data"),
    }
    verdict = find_verdict(answers, {})
    assert verdict.blamed == (1,)
    assert "has begun 29 operations of ranks 0, 1, and rank 0 30" in verdict.lines[0]
    assert len(verdict.lines) == 3


def test_a_missing_send_is_found() -> None:
    """The receiver waits in a transfer whose sender has not come to it."""
    transfer = "world: 0 to 1"
    answers = {
        0: state(0, {transfer: channel(6, 0, 1, operation="send")}),
        1: state(1, {transfer: channel(7, 0, 1, operation="recv")}, waits_in=transfer),
    }
    assert find_verdict(answers, {}).blamed == (0,)


def test_operations_that_do_not_belong_together() -> None:
    answers = {
        0: state(0, {"tensor": channel(3, 0, 1), "world": channel(8, 0, 1)}, waits_in="tensor"),
        1: state(1, {"tensor": channel(2, 0, 1), "world": channel(9, 0, 1)}, waits_in="world"),
    }
    verdict = find_verdict(answers, {})
    assert verdict.blamed == ()
    assert verdict.lines[0] == "no rank is behind: all wait, in operations that do not belong together."
    assert len(verdict.lines) == 3


def test_ranks_that_queue_their_operations_are_compared_by_their_numbers() -> None:
    """As on GPUs, where no rank is inside an operation."""
    answers = {rank: state(rank, {"world": channel(20 - (rank == 2), 0, 1, 2, 3)}) for rank in range(4)}
    assert find_verdict(answers, {}).blamed == (2,)


def test_one_rank_alone() -> None:
    verdict = find_verdict({0: state(0, {})}, {})
    assert verdict.blamed == (0,)
    assert "waits for no other rank: it is in step 41, at a.py:1 in f" in verdict.lines[0]


def test_of_many_ranks_a_few_lines_are_shown() -> None:
    ranks = range(512)
    answers = {rank: state(rank, {"world": channel(20, *ranks)}, waits_in="world") for rank in ranks if rank != 77}
    verdict = find_verdict(answers, {77: state(77, {"world": channel(19, *ranks)})})
    assert verdict.blamed == (77,) and len(verdict.lines) == 10
    assert "operation 20 of ranks 0 to 511" in verdict.lines[1]
    assert verdict.lines[-1] == "503 more ranks wait like these."


@pytest.mark.parametrize("ranks", [(0,), (0, 1), (3, 5, 7), (0, 1, 5), (7, 3), tuple(range(0, 4096, 8))])
def test_a_state_is_read_as_it_was_told(ranks: tuple[int, ...]) -> None:
    told = state(1, {"world": channel(3, *ranks)}, waits_in="world")
    assert RankState.decode(told.encode()) == told
    assert len(told.encode()) < 600
