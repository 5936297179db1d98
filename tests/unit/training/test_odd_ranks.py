"""Ranks that differ from the others are named, with their machines."""

from __future__ import annotations

from megatron.training.preflight import odd_ranks

GPU, OLD = {"device": "H200", "torch": "2.13.0"}, {"device": "H200", "torch": "2.12.1"}


def test_equal_ranks_have_nothing_to_say() -> None:
    assert odd_ranks([("a", GPU), ("b", GPU)]) == []


def test_what_differs_is_told_by_rank_and_machine() -> None:
    assert odd_ranks([("a", GPU), ("a", GPU), ("b", OLD)]) == [
        "torch is 2.12.1 on rank 2 (b), and 2.13.0 on the others"
    ]
    # The first of equal numbers is taken for the rule.
    assert odd_ranks([("a", GPU), ("b", OLD)]) == ["torch is 2.12.1 on rank 1 (b), and 2.13.0 on the others"]


def test_many_ranks_are_counted() -> None:
    slower = GPU | {"device": "H100"}
    (text,) = odd_ranks([("a", GPU)] * 9 + [("b", slower)] * 8)
    assert (
        text == "device is H100 on rank 9 (b), rank 10 (b), rank 11 (b), rank 12 (b) and 4 more, and H200 on the others"
    )
