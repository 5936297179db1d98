"""Some cases of a product of choices, in which any two choices still meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, TypeVar

Case = TypeVar("Case")


def pairs(choices: Sequence[Any]) -> set[Any]:
    """Every two of a case's choices."""
    return set(combinations(enumerate(choices), 2))


def pairwise_cover(cases: Sequence[Case], choices: Callable[[Case], Sequence[Any]]) -> list[Case]:
    """Some of the cases that make every pair of choices that any of them makes; greedy, not the smallest."""
    missing = set().union(*(pairs(choices(case)) for case in cases))
    cover = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(choices(case)) & missing))
        cover.append(best)
        missing -= pairs(choices(best))
    return cover
