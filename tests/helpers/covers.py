"""Some cases of a product of choices, in which any two choices still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def pairs(choices: Sequence[Any]) -> set[Any]:
    """Returns every two of a case's choices."""
    return set(combinations(enumerate(choices), 2))


def pairwise_cover(cases: Sequence[Case], choices: Callable[[Case], Sequence[Any]]) -> list[Case]:
    """Returns some of the cases that make every pair of choices that any of them makes; greedy, not the fewest."""
    missing = set().union(*(pairs(choices(case)) for case in cases))
    cover = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(choices(case)) & missing))
        cover.append(best)
        missing -= pairs(choices(best))
    return cover


def covered(cases: Sequence[Any], cover: Sequence[Any] | None = None) -> list[Any]:
    """Returns all cases for `pytest.mark.parametrize`, of which `make test` runs the cover and `make test-full` all.

    A case is one argument of the test, or a tuple of its arguments. Without a cover given, it is a pairwise one.
    """
    chosen = pairwise_cover(cases, list) if cover is None else cover
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=None if isinstance(case, tuple) else str(case),
            marks=[] if case in chosen else pytest.mark.full,
        )
        for case in cases
    ]
