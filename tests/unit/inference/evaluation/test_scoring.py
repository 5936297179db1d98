"""Requests become rows of batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import DataError
from megatron.inference.evaluation.harness.continuation_scores import plan_rows
from megatron.inference.evaluation.harness.response_cache import ResponseCache


def test_requests_with_the_same_input_share_a_row() -> None:
    rows, places = plan_rows([([1, 2], [3]), ([1, 2], [4]), ([1], [2, 4]), ([9], [9]), ([1, 2], [3])], max_length=8)
    assert [(row.tokens, row.targets) for row in rows] == [((1, 2), ((3,), (4,), (2, 4))), ((9,), ((9,),))]
    assert [tuple(place) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 0)]


def test_what_is_too_long_loses_its_left_end() -> None:
    rows, _ = plan_rows([(list(range(10)), [10, 11])], max_length=4)
    assert rows[0].tokens == (7, 8, 9, 10)


@pytest.mark.parametrize(
    ("pair", "said"),
    [(([1], []), "empty text"), (([], [1]), "without anything before"), (([1], [2] * 9), "of 9 tokens")],
)
def test_requests_without_an_answer(pair: tuple[list[int], list[int]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        plan_rows([pair], max_length=8)


def test_a_cache_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("no JSON\n")
    with pytest.raises(DataError, match=r"eval_cache: .*answers\.jsonl cannot be used"):
        ResponseCache(path)
