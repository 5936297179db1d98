"""Cuts the flat gradients of a stage into buckets, each of which is summed to the one rank that steps it.

ZeRO-1 gives each data-parallel rank an equal, contiguous part of every optimizer group's flat tensor. A bucket is a
contiguous range of one such part, so that a `reduce` to its owner moves what a reduce-scatter would; partitions, and
with them checkpoints, are what DeepSpeed makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

LARGEST = 2**23
"""Elements of a bucket, at most [elements]: 32 MiB of fp32. Larger ones travel no faster, and leave the wire idle until
they are full; torch's DDP takes 25 MiB."""


@dataclass(frozen=True)
class Member:
    """A parameter of an optimizer group."""

    order: int
    """Its place in the model. The backward pass comes to the last one first."""
    size: int
    """Elements."""
    is_tied: bool = False
    """Whether pipeline stages share it, who sum their gradients first."""


@dataclass(frozen=True)
class Bucket:
    """A range of a group's flat gradient that is summed at once."""

    group: int
    place: slice
    """Elements of the flat gradient."""
    owner: int
    """The data-parallel rank whose part it lies in."""
    members: tuple[int, ...]
    """Numbers in the group of the parameters that lie in it, wholly or not."""
    is_tied: bool

    @property
    def size(self) -> int:
        """Returns its elements."""
        size: int = self.place.stop - self.place.start
        return size


def plan_buckets(groups: Sequence[Sequence[Member]], part_sizes: Sequence[int], largest: int) -> list[Bucket]:
    """Returns the buckets of all groups in the order in which the backward pass completes them, tied weights last.

    `part_sizes` has the elements of a rank's part of each group; the flat tensor begins with the first member, and its
    padding at the end is in no bucket. The order is the same on all ranks of a stage, as their collectives must be.
    """
    largest = min(largest, LARGEST)
    planned = [
        (bucket.is_tied, -min(members[number].order for number in bucket.members), bucket)
        for group, (members, part_size) in enumerate(zip(groups, part_sizes, strict=True))
        for bucket in _join(group, list(_pieces(members, part_size, largest)), members, part_size, largest)
    ]
    return [bucket for _, _, bucket in sorted(planned, key=lambda one: one[:2])]


def _pieces(members: Sequence[Member], part_size: int, largest: int) -> Iterator[tuple[int, int, int]]:
    """Yields (number, start, stop) of each member, cut at the borders of parts, and where it is too large."""
    ends = list(accumulate(member.size for member in members))
    for number, (member, end) in enumerate(zip(members, ends, strict=True)):
        start = end - member.size
        while start < end:
            border = (start // part_size + 1) * part_size
            stop = min(end, border, start + largest)
            yield number, start, stop
            start = stop


def _join(
    group: int, pieces: Sequence[tuple[int, int, int]], members: Sequence[Member], part_size: int, largest: int
) -> Iterator[Bucket]:
    """Joins neighbouring pieces of one part into buckets, from the last one, whose gradient comes first."""
    joined: list[tuple[int, int, int]] = []

    def belongs(piece: tuple[int, int, int]) -> bool:
        first = joined[-1]
        return (
            piece[1] // part_size == first[1] // part_size
            and members[piece[0]].is_tied == members[first[0]].is_tied
            and joined[0][2] - piece[1] <= largest
        )

    for piece in reversed(pieces):
        if joined and not belongs(piece):
            yield _bucket(group, joined, members, part_size)
            joined = []
        joined.append(piece)
    if joined:
        yield _bucket(group, joined, members, part_size)


def _bucket(group: int, joined: Iterable[tuple[int, int, int]], members: Sequence[Member], part_size: int) -> Bucket:
    pieces = sorted(joined, key=lambda piece: piece[1])
    start, stop = pieces[0][1], pieces[-1][2]
    numbers = tuple(dict.fromkeys(number for number, _, _ in pieces))
    return Bucket(group, slice(start, stop), start // part_size, numbers, members[numbers[0]].is_tied)
