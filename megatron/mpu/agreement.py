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


def on_first_rank_meanwhile(
    work: Callable[[], T], waiting: Callable[[], object] = lambda: None, every: float = 2.0
) -> T:
    """Does what `on_first_rank` does with work that may take longer than ranks wait for each other. Collective.

    Rank 0 does it in a thread, and tells the others `every` so many seconds [s] that it still goes on; then `waiting`
    is called on each.
    """
    results = on_some_ranks_meanwhile(work if rank_and_size()[0] == 0 else None, waiting, every)
    return results[0]  # type: ignore[return-value] # rank 0 has work


def on_some_ranks_meanwhile(
    work: Callable[[], T] | None, waiting: Callable[[], object] = lambda: None, every: float = 2.0
) -> list[T | None]:
    """Runs `work` on the ranks that have some, as `on_first_rank_meanwhile` does; returns the results by rank.

    Collective. A UserError or OSError of any rank is raised on all of them.
    """
    outcome: list[tuple[T | None, BaseException | None]] = [] if work is not None else [(None, None)]

    def run() -> None:
        if work is not None:
            outcome.append(_outcome_of(work))

    thread = threading.Thread(target=run, name="long work of a rank", daemon=True)
    thread.start()
    while True:
        thread.join(every)
        if not any(gather_objects(thread.is_alive())):
            break
        waiting()
    result, failure = outcome[0]
    if failure is not None and not isinstance(failure, UserError | OSError):
        raise failure
    gathered = gather_objects((result, failure))
    for _, other in gathered:
        if other is not None:
            raise other
    return [found for found, _ in gathered]


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
