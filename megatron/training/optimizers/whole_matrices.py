"""Brings matrices together whose pieces lie in the flat partitions of a pipeline stage's ranks, and takes them apart.

Under ZeRO-1 a data-parallel rank steps an equal part of a flat tensor, whose borders cut through matrices; under tensor
parallelism each rank has a share of the rows or columns. What needs a whole matrix is done by one of the ranks that
hold pieces of it: the one with the largest, and of several such ranks the one with the least work so far. A matrix that
lies on one rank stays there; the others travel in two exchanges, there and back, of all ranks at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from megatron.checkpointing.engine.flat_partitions import Fragment
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec, parameter_spec


@dataclass(frozen=True)
class _Piece:
    """A rank's part of a matrix."""

    rank: int
    """Rank in the stage."""
    share: int
    """The tensor-parallel share that it is of; 0 where the matrix is not split."""
    own: slice
    """Its elements in the flattened share."""
    place: slice
    """Their place in that rank's partition."""

    @property
    def size(self) -> int:
        """Returns its elements."""
        size: int = self.own.stop - self.own.start
        return size


@dataclass(frozen=True)
class _Matrix:
    """A matrix, whose pieces lie on one rank or several."""

    shape: tuple[int, int]
    """Rows and columns over all shares."""
    shares: int
    """Tensor-parallel shares that it is split into, 1 where it is not."""
    split_dim: int | None
    owner: int
    """Rank in the stage that changes it."""
    pieces: tuple[_Piece, ...]

    @property
    def travels(self) -> bool:
        """Tells whether its owner holds less than all of it."""
        return len(self.pieces) > 1

    def joined(self, shares: Tensor) -> Tensor:
        """Returns the matrix of its flattened shares [shares, elements of one]."""
        if self.split_dim != 1:
            return shares.view(self.shape)
        return shares.view(self.shares, self.shape[0], -1).movedim(0, 1).reshape(self.shape)

    def taken_apart(self, matrix: Tensor) -> Tensor:
        """Returns its flattened shares [shares, elements of one]."""
        if self.split_dim != 1:
            return matrix.reshape(self.shares, -1)
        return matrix.view(self.shape[0], self.shares, -1).movedim(1, 0).reshape(self.shares, -1)


@dataclass(frozen=True)
class _Route:
    """The way of a piece to its matrix's owner."""

    number: int
    """Place of the matrix among those that travel."""
    owner: int
    piece: _Piece


class WholeMatrices:
    """The matrices of one optimizer group in a pipeline stage."""

    def __init__(
        self, fragments: Sequence[Fragment], context: ParallelContext, group: distributed.ProcessGroup | None
    ) -> None:
        """Gathers the places of all pieces, from this rank's `fragments` of the matrices. Collective over the stage.

        `group` has the ranks of the stage, as `stage_group` numbers them; None for one rank alone.
        """
        own = [(fragment.own, fragment.place) for fragment in fragments]
        places: list[Any] = [own]
        if group is not None:
            places = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(places, own, group=group)
        specs = [parameter_spec(fragment.parameter) for fragment in fragments]
        matrices = list(_matrices(specs, places, context.tensor_size))
        rank = context.data_rank * context.tensor_size + context.tensor_rank
        self._group = group
        self._at_home = [matrix for matrix in matrices if not matrix.travels and matrix.owner == rank]
        self._travelling = [matrix for matrix in matrices if matrix.travels]
        routes = [
            _Route(number, matrix.owner, piece)
            for number, matrix in enumerate(self._travelling)
            for piece in matrix.pieces
        ]
        # In an exchange, parts lie in the order of the ranks that they go to, or come from.
        self._held = sorted((r for r in routes if r.piece.rank == rank), key=lambda r: (r.owner, r.number))
        self._owned = sorted((r for r in routes if r.owner == rank), key=lambda r: (r.piece.rank, r.number))
        ranks = range(len(places))
        self._held_sizes = [sum(r.piece.size for r in self._held if r.owner == other) for other in ranks]
        self._owned_sizes = [sum(r.piece.size for r in self._owned if r.piece.rank == other) for other in ranks]

    def change(self, flat: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces each matrix by `function` of it, in the partition `flat` of every rank. Collective over the stage.

        `function` is given a matrix [rows, columns] of `flat`'s format, and returns one of that shape and format.
        """
        for matrix in self._at_home:
            (piece,) = matrix.pieces
            flat[piece.place] = function(flat[piece.place].view(matrix.shape)).reshape(-1)
        if self._travelling:
            shares = self._collect(flat)
            for number, own in shares.items():
                matrix = self._travelling[number]
                shares[number] = matrix.taken_apart(function(matrix.joined(own)))
            self._return(shares, flat)

    def _collect(self, flat: Tensor) -> dict[int, Tensor]:
        """Sends the pieces to their owners; returns the shares of this rank's matrices, by the matrix's number."""
        parts = [flat[route.piece.place] for route in self._held]
        shares: dict[int, Tensor] = {}
        arrived = self._exchange(parts, self._held_sizes, self._owned_sizes, flat)
        for route, part in zip(self._owned, torch.split(arrived, [r.piece.size for r in self._owned]), strict=True):
            if route.number not in shares:
                matrix = self._travelling[route.number]
                rows, columns = matrix.shape
                shares[route.number] = flat.new_empty(matrix.shares, rows * columns // matrix.shares)
            shares[route.number][route.piece.share, route.piece.own] = part
        return shares

    def _return(self, shares: dict[int, Tensor], flat: Tensor) -> None:
        """Sends the pieces back to their holders, who put them in their places."""
        parts = [shares[route.number][route.piece.share, route.piece.own] for route in self._owned]
        arrived = self._exchange(parts, self._owned_sizes, self._held_sizes, flat)
        for route, part in zip(self._held, torch.split(arrived, [r.piece.size for r in self._held]), strict=True):
            flat[route.piece.place] = part

    def _exchange(self, parts: list[Tensor], sent: list[int], received: list[int], like: Tensor) -> Tensor:
        arrived = like.new_empty(sum(received))
        distributed.all_to_all_single(
            arrived, torch.cat(parts) if parts else like.new_empty(0), received, sent, group=self._group
        )
        return arrived


def _matrices(
    specs: Sequence[ParameterSpec], places: Sequence[Sequence[tuple[slice, slice]]], tensor_size: int
) -> Iterator[_Matrix]:
    """Yields the matrices with their owners, the same on all ranks of a stage.

    `places` has, by rank, the range of each parameter's share that the rank holds, and its place there. A matrix that
    is not split over tensor-parallel ranks is one on each of them.
    """
    work = [0] * len(places)
    for number, spec in enumerate(specs):
        rows, columns = spec.full_shape
        is_split = spec.shard_dim is not None and tensor_size > 1
        pieces = [
            _Piece(rank, rank % tensor_size if is_split else 0, *held[number])
            for rank, held in enumerate(places)
            if held[number][0].stop > held[number][0].start
        ]
        copies = (
            [pieces] if is_split else [[p for p in pieces if p.rank % tensor_size == t] for t in range(tensor_size)]
        )
        for copy in copies:
            owner = max(copy, key=lambda piece: (piece.size, -work[piece.rank], -piece.rank)).rank
            work[owner] += rows * columns * min(rows, columns)
            shares = tensor_size if is_split else 1
            yield _Matrix((rows, columns), shares, spec.shard_dim if is_split else None, owner, tuple(copy))
