"""A pool of ranks: rank 0 drives, and every rank computes a share of what it requests until it dismisses them.

So all ranks' results meet in one place, tasks and prompts are read once, and metrics are computed by one process: they
cannot depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.errors import UserError
from megatron.mpu.context import ParallelContext

T = TypeVar("T")

REQUEST_TIMEOUT = timedelta(days=7)
"""Time that ranks wait for a request of rank 0, which may be reading tasks, or waiting for a user."""


class RankPool:
    """The ranks that a loaded model runs on, laid out by `context`.

    `compute(method, items, options)` returns a result for each item, on every rank; the tensor-parallel ranks of one
    data-parallel rank are given the same items. Collective: all ranks make one. As a context manager, rank 0 dismisses
    the others at the end.
    """

    def __init__(self, context: ParallelContext, compute: Callable[[str, Sequence[Any], dict[str, Any]], list[Any]]):
        self.context = context
        self._compute = compute
        self._dismissed = False
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # gloo, whatever the tensors travel by: these messages are Python objects, and NCCL gives up on waiting ranks.
        self._group = dist.new_group(backend="gloo", timeout=REQUEST_TIMEOUT) if self._several else None

    @property
    def is_driver(self) -> bool:
        """Tells whether this is rank 0, which requests while the others `serve`."""
        return not self._several or dist.get_rank() == 0

    def request(self, method: str, items: Sequence[Any], **options: Any) -> list[Any]:
        """Computes a result for each item, in their order, on all ranks together; only on the driver.

        Ranks take items in turn, so that neighbours of like length are shared out. A UserError on any rank is raised.
        """
        if self._several:
            dist.broadcast_object_list([(method, list(items), options)], src=0, group=self._group)
        return self._compute_share(method, items, options)

    def serve(self) -> None:
        """Computes what the driver requests until it is done. Raises the UserError that ends the driver."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self._group)
            if isinstance(message[0], UserError):
                raise message[0]
            if message[0] is None:
                return
            self._compute_share(*message[0])

    def _compute_share(self, method: str, items: Sequence[T], options: dict[str, Any]) -> list[Any]:
        place, size = self.context.data_rank, self.context.data_size
        outcome: list[Any] | UserError
        try:
            outcome = self._compute(method, items[place::size], options)
        except UserError as error:
            self._dismissed = True
            if self.context.tensor_size > 1:
                raise  # the other tensor-parallel ranks wait inside the model, and cannot be told
            outcome = error
        outcomes = [outcome]
        if self._several:
            outcomes = [[]] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome if self.context.tensor_rank == 0 else None, group=self._group)
        results: list[Any] = [None] * len(items)
        for share, found in enumerate(outcomes[:: self.context.tensor_size]):
            if isinstance(found, UserError):
                self._dismissed = True
                raise found
            results[share::size] = found
        return results

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error of another kind the ranks may be anywhere; the launcher ends them.
        understood = error is None or isinstance(error, UserError)
        if self._several and self.is_driver and understood and not self._dismissed:
            dist.broadcast_object_list([error], src=0, group=self._group)
