"""Decisions that all ranks must share: rank 0 takes one and all learn it, or each reports and all learn everything.

Without a process group, as in the tools, this process is the only rank.
"""

from __future__ import annotations

import threading
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


def on_first_rank_of_each_node(work: Callable[[], T], local_rank: int) -> T | None:
    """Runs `work` where `local_rank` is 0, and returns its result there; None elsewhere, when all are done. Collective.

    A UserError or OSError of one of them is raised on every rank.
    """
    result: T | None = None
    failure: Exception | None = None
    if local_rank == 0:
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
    for other in gather_objects(failure):
        if other is not None:
            raise other
    return result


def on_first_rank_meanwhile(work: Callable[[], T], waiting: Callable[[], object], every: float = 2.0) -> T:
    """Does what `on_first_rank` does with work that may take longer than ranks wait for each other. Collective.

    Rank 0 does it in a thread, and tells the others `every` so many seconds [s] that it still goes on; then `waiting`
    is called on each.
    """
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome_of(work)), name="work of rank 0", daemon=True)
    if rank_and_size()[0] == 0:
        thread.start()

    def is_done() -> bool:
        thread.join(every)
        return not thread.is_alive()

    while not on_first_rank(is_done):
        waiting()

    def handed_over() -> T:
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return] # what work() returned

    return on_first_rank(handed_over)


def _outcome_of(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except BaseException as error:  # noqa: BLE001 - it is raised where the thread is waited for
        return None, error


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, in the order of ranks, on every rank. Collective."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values
