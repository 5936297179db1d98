"""Findings of checks, and the arithmetic of what they propose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megatron.config.sections.run_config import RunConfig


@dataclass(frozen=True)
class Finding:
    """Values that do not fit together, reported at one of them."""

    path: str
    """Dotted path of the value to point at."""
    message: str
    """What is wrong, why, and a way out. Other values are named by their YAML keys."""


def nearest_multiple(value: int, divisor: int) -> int:
    """Returns the positive multiple of `divisor` that lies nearest to `value`."""
    return max(round(value / divisor), 1) * divisor


def divisors(value: int) -> list[int]:
    """Lists the divisors of `value`, from 1 to itself."""
    return [number for number in range(1, value + 1) if value % number == 0]


def nearest_of(valid: Iterable[int], value: int) -> int:
    """Returns the one of `valid` that lies nearest to `value`, the first of two."""
    return min(valid, key=lambda number: abs(number - value))


Check = Callable[[RunConfig], Iterator[Finding]]
"""Yields what does not fit together in a configuration."""
