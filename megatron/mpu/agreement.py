"""What all ranks must agree on: one of them looks, or each looks at its share, and all learn the same.

Without a process group, as in the tools, this process is the only rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from megatron.errors import CheckpointError, UserError

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def on_first_rank(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; a UserError that it raises there is raised everywhere.

    An OSError becomes a CheckpointError with its message.
    """
    rank, size = rank_and_size()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = CheckpointError(f"{error.filename or 'the checkpoint folder'}: {error.strerror or error}")
    if size > 1:
        distributed.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return] # what work() returned, sent as an object


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    distributed.all_gather_object(values, value)
    return values
