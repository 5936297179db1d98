"""Decisions that all ranks must share: rank 0 takes one and all learn it, or each reports and all learn everything.

Without a process group, as in the tools, this process is the only rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from megatron.errors import UserError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Returns this rank and the number of ranks."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def on_first_rank(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 and returns its result on every rank. Collective.

    A UserError or OSError that it raises there is raised on every rank, so that none waits for a result.
    """
    rank, size = rank_and_size()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = error
    if size > 1:
        distributed.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return] # what work() returned, sent as an object


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, in the order of ranks, on every rank. Collective."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values
