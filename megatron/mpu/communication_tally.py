"""Adds up what a rank sends in training steps: calls, bytes and time, by operation and by the ranks that take part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, distributed

from megatron.mpu.context import ParallelContext
from megatron.mpu.waiting_time import WaitingTime, waiting_time


@dataclass
class Tallied:
    """Sums over the operations of one kind in one channel."""

    calls: int = 0
    num_bytes: int = 0
    """Bytes of the whole tensors, as every rank of the channel would hold them."""
    time: WaitingTime = field(default_factory=waiting_time)
    """Time in them, which is spent waiting for the slowest rank as well."""


class CommunicationTally:
    """Counts while it is told that a step is taken."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Tallied] = {}
        """By operation and by name of the channel (collective_trace.py)."""
        self.steps = 0
        self._in_step = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Counts the operations inside as those of one step."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        self.steps += 1

    def begin(self, operation: str, channel: str, arguments: Sequence[Any]) -> tuple[Tallied, Any] | None:
        """Counts an operation that begins, by its arguments; returns what `end` is to be given. None between steps."""
        if not self._in_step:
            return None
        row = self.rows.setdefault((operation, channel), Tallied())
        row.calls += 1
        row.num_bytes += _whole_bytes(arguments)
        return row, row.time.begin()

    def end(self, begun: tuple[Tallied, Any]) -> None:
        """Adds the time of an operation."""
        row, mark = begun
        row.time.end(mark)


def _whole_bytes(arguments: Iterable[Any]) -> int:
    """Returns the size of the largest tensor, or list of tensors, among an operation's arguments [bytes].

    That is the whole of what is gathered or scattered, not a rank's share of it.
    """
    sizes = [0]
    for argument in arguments:
        tensors = [argument] if isinstance(argument, Tensor) else argument if isinstance(argument, list) else []
        sizes.append(sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor)))
    return max(sizes)


Describe = Callable[[tuple[int, ...]], str]
"""Names the ranks of a channel."""
HEADER = ("operation", "among", "calls", "MiB", "ms")


def communication_table(tally: CommunicationTally, ranks_of: Mapping[str, tuple[int, ...]], ours: Describe) -> str:
    """Formats the mean step of this rank as a table, most bytes first. `ranks_of` has the ranks of each channel.

    Channels of the same kind, such as the two directions of a pipeline, are one row; those of one rank alone are none.
    """
    kinds: dict[tuple[str, str], list[Tallied]] = {}
    for (operation, channel), row in tally.rows.items():
        if len(set(ranks_of[channel])) > 1:
            kinds.setdefault((operation, ours(ranks_of[channel])), []).append(row)
    lines = []
    steps = max(tally.steps, 1)
    for (operation, among), rows in sorted(kinds.items(), key=lambda kind: -sum(row.num_bytes for row in kind[1])):
        calls, size = sum(row.calls for row in rows), sum(row.num_bytes for row in rows)
        seconds = sum(row.time.seconds() for row in rows)
        figures = (f"{calls / steps:,.1f}", f"{size / steps / 2**20:,.3f}", f"{1e3 * seconds / steps:,.2f}")
        lines.append((operation, among, *figures))
    if not lines:
        return "nothing is sent: there is one rank"
    widths = [max(len(line[column]) for line in (HEADER, *lines)) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in (HEADER, *lines)
    )  # fmt: skip


def kind_of_ranks(ranks: tuple[int, ...], context: ParallelContext) -> str:
    """Names the ranks of a channel of this rank by their place in the layout."""
    groups = (("tensor-parallel ranks", context.tensor_group), ("data-parallel ranks", context.data_group))
    for name, group in groups:
        if group is not None and tuple(distributed.get_process_group_ranks(group)) == ranks:
            return name
    stage = context.tensor_size * context.data_size
    if len({rank % stage for rank in ranks}) == 1:
        return "pipeline stages"
    return "all ranks" if len(ranks) == distributed.get_world_size() else f"ranks {', '.join(map(str, ranks))}"
