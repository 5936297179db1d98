"""Rank 0 asks; every rank answers a share of what is asked, until it is told to stop.

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

PATIENCE = timedelta(days=7)
"""How long ranks wait for rank 0, which may be reading tasks, or waiting for a user."""


class Ranks:
    """The ranks that a trained model runs on, laid out by `context`.

    `answer(method, items, options)` computes on every rank; the tensor-parallel ranks of one data-parallel rank are
    given the same items. Collective: all ranks make one. As a context manager, rank 0 dismisses the others at the end.
    """

    def __init__(self, context: ParallelContext, answer: Callable[[str, Sequence[Any], dict[str, Any]], list[Any]]):
        self.context = context
        self.answer = answer
        self.dismissed = False
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        # gloo, whatever the tensors travel by: these messages are Python objects, and NCCL gives up on waiting ranks.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.several else None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which asks."""
        return not self.several or dist.get_rank() == 0

    def ask(self, method: str, items: Sequence[Any], **options: Any) -> list[Any]:
        """What `answer` says of each item, in their order; only on rank 0, while the others `follow`.

        Ranks take items in turn, so that neighbours of like length are shared out. A UserError on any rank is raised.
        """
        if self.several:
            dist.broadcast_object_list([(method, list(items), options)], src=0, group=self.group)
        return self._answer_share(method, items, options)

    def follow(self) -> None:
        """Answer until rank 0 is done. Raises what rank 0 raises."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0, group=self.group)
            if isinstance(message[0], UserError):
                raise message[0]
            if message[0] is None:
                return
            self._answer_share(*message[0])

    def _answer_share(self, method: str, items: Sequence[T], options: dict[str, Any]) -> list[Any]:
        place, size = self.context.data_rank, self.context.data_size
        outcome: list[Any] | UserError
        try:
            outcome = self.answer(method, items[place::size], options)
        except UserError as error:
            self.dismissed = True
            if self.context.tensor_size > 1:
                raise  # the other tensor-parallel ranks wait inside the model, and cannot be told
            outcome = error
        outcomes = [outcome]
        if self.several:
            outcomes = [[]] * dist.get_world_size()
            dist.all_gather_object(outcomes, outcome if self.context.tensor_rank == 0 else None, group=self.group)
        answers: list[Any] = [None] * len(items)
        for share, found in enumerate(outcomes[:: self.context.tensor_size]):
            if isinstance(found, UserError):
                self.dismissed = True
                raise found
            answers[share::size] = found
        return answers

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error of another kind the ranks may be anywhere; the launcher ends them.
        understood = error is None or isinstance(error, UserError)
        if self.several and self.first and understood and not self.dismissed:
            dist.broadcast_object_list([error], src=0, group=self.group)
