"""Numbers the collectives and pipeline transfers of this rank, to compare ranks that wait for each other."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import distributed
from torch.distributed import distributed_c10d

from megatron.mpu.communication_tally import CommunicationTally, Tallied
from megatron.mpu.waiting_time import waiting_time

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "gather", "scatter"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single"),
    *("all_to_all", "all_to_all_single"),
)
"""Functions of torch.distributed in which every rank of a group takes part; versions of torch lack some of them."""
TRANSFERS = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}
"""Functions that move a tensor between two ranks -> the argument that names the other one."""


@dataclass
class Channel:
    """Operations of this rank in one process group, or with one peer in one direction."""

    ranks: tuple[int, ...]
    """Ranks that take part, as numbered in the default group; of a transfer, sender and receiver."""
    begun: int = 0
    """Operations begun."""
    finished: int = 0
    """Operations that have returned. A GPU, or the background, may still have to do what was queued."""
    operation: str = ""
    """Name of the last one begun."""


@dataclass(frozen=True)
class OpenOperation:
    """The operation that this rank is in."""

    channel: str
    """Key of its channel."""
    operation: str
    """Name of the function."""
    number: int
    """Its place among the operations of its channel, from 1."""
    seconds: float
    """Time since it began [s]."""


class CollectiveTrace:
    """Counts of all operations of this rank, by channel: the same operation has the same number on all of its ranks.

    Operations come from one thread at a time, while others may read. Compiled code does not pass through here.
    """

    def __init__(self) -> None:
        self.channels: dict[str, Channel] = {}
        """Channels by a name that all their ranks share."""
        self.waited = waiting_time()
        """Time spent in operations so far."""
        self.tally: CommunicationTally | None = None
        """Counts bytes and time of the operations, while there is one."""
        self._known: dict[Any, tuple[str, Channel]] = {}
        self._open: tuple[str, Channel, float] | None = None

    def open_operation(self) -> OpenOperation | None:
        """Returns the operation that this rank is in at present."""
        if (current := self._open) is None:
            return None
        name, channel, since = current
        return OpenOperation(name, channel.operation, channel.begun, time.monotonic() - since)

    def record(self, function: Callable[..., Any], group_at: int, peer: str | None) -> Callable[..., Any]:
        """Wraps a function of torch.distributed whose argument number `group_at` is its group.

        `peer` names the argument with the other rank of a transfer, which comes second.
        """
        operation = function.__name__

        @functools.wraps(function)
        def recorded(*arguments: Any, **named: Any) -> Any:
            # Dynamo replaces collectives by those of its own, which it knows by identity. Some are made of others.
            if torch.compiler.is_compiling() or self._open is not None:
                return function(*arguments, **named)
            group = arguments[group_at] if len(arguments) > group_at else named.get("group")
            if peer is None:
                key = group
            else:
                key = (group, peer, arguments[1] if len(arguments) > 1 else named.get(peer), named.get(f"group_{peer}"))
            name, channel = self._known.get(key) or self._channel(key, group, peer)
            channel.operation = operation
            channel.begun += 1
            tally = self.tally
            counted = None if tally is None else tally.begin(operation, name, (*arguments, *named.values()))
            try:
                with self._inside(name, channel):
                    result = function(*arguments, **named)
            finally:
                channel.finished += 1
                if tally is not None and counted is not None:
                    tally.end(counted)
            if peer is None and isinstance(result, distributed.Work):
                return _BackgroundWork(result, self, (name, channel), None if counted is None else counted[0])
            return result

        return recorded

    @contextmanager
    def _inside(self, name: str, channel: Channel) -> Iterator[None]:
        """Counts the time of the body as spent in the channel's last operation."""
        self._open = name, channel, time.monotonic()
        mark = self.waited.begin()
        try:
            yield
        finally:
            self._open = None
            self.waited.end(mark)

    def _channel(self, key: Any, group: Any, peer: str | None) -> tuple[str, Channel]:
        group = distributed.group.WORLD if group is None else group
        name = str(group.group_name)
        if peer is None:
            ranks = tuple(distributed.get_process_group_ranks(group))
        else:
            _, _, other, in_group = key
            if other is None and in_group is not None:
                other = distributed.get_global_rank(group, in_group)
            # A receiver that takes from whoever comes has no channel in common with its senders.
            other = -1 if other is None else int(other)
            ranks = (other, distributed.get_rank()) if peer == "src" else (distributed.get_rank(), other)
            name = f"{name}: {ranks[0]} to {ranks[1]}"
        found = name, self.channels.setdefault(name, Channel(ranks))
        self._known[key] = found
        return found


class _BackgroundWork:
    """A collective that goes on beside the rank's work. To wait for it is to be in it."""

    def __init__(
        self, work: distributed.Work, trace: CollectiveTrace, place: tuple[str, Channel], row: Tallied | None
    ) -> None:
        self._work, self._trace, self._place, self._row = work, trace, place, row

    def wait(self, *arguments: Any, **named: Any) -> Any:
        """Waits as torch's handle does."""
        mark = None if self._row is None else self._row.time.begin()
        with self._trace._inside(*self._place):
            result = self._work.wait(*arguments, **named)
        if self._row is not None:
            self._row.time.end(mark)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextmanager
def traced_collectives() -> Iterator[CollectiveTrace]:
    """Records the operations of the default process group and of all others while the body runs.

    torch calls some of its functions from others, by their names in the module that defines them, and DeepSpeed by
    those in the package: both are replaced.
    """
    trace = CollectiveTrace()
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name in (*COLLECTIVES, *TRANSFERS):
        function = getattr(distributed_c10d, name, None)
        if function is None:
            continue
        group_at = list(inspect.signature(function).parameters).index("group")
        recorded = trace.record(function, group_at, TRANSFERS.get(name))
        for module in (distributed_c10d, distributed):
            replaced.append((module, name, getattr(module, name)))
            setattr(module, name, recorded)
    try:
        yield trace
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)
