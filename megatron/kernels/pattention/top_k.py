"""Pattention that reads the values of the strongest tokens of each position alone, for evaluation and generation.

The keys of all tokens are multiplied, and Theta normalizes over all of them. A token's strength is what it can add to
the output, |weight| ||value||. What is left out are the products with the other values, which is what a block-sparse
kernel would save: `ValueReads` counts it. This computes all of them, and is no faster.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.kernels.pattention.theta import THETAS, RowReduction

SPARSE_BLOCK = 32
"""Neighboring tokens that a block-sparse kernel reads together [tokens]."""


@dataclass
class ValueReads:
    """Counts of the values that positions read in the Pattentions of a rank, over all calls."""

    everything: int = 0
    """Values that there are, position by position [tokens]."""
    chosen: int = 0
    """Those that were chosen [tokens]."""
    in_blocks: int = 0
    """Those in blocks of SPARSE_BLOCK tokens with a chosen one, which a block-sparse kernel would read [tokens]."""

    def add(self, is_chosen_RJp: Tensor) -> None:
        """Counts the choice of some positions."""
        blocks = torch.split(is_chosen_RJp, SPARSE_BLOCK, dim=-1)
        self.everything += is_chosen_RJp.numel()
        self.chosen += int(is_chosen_RJp.sum())
        self.in_blocks += sum(int(block.any(-1).sum()) * block.shape[-1] for block in blocks)


class TopKPattention:
    """A `PattentionFunction` for frozen weights: reads `top_k` tokens, or that part of them, in blocks of `block`."""

    def __init__(self, top_k: int | float, block: int, reads: ValueReads) -> None:
        self.top_k, self.block, self.reads = top_k, block, reads
        self._lengths: Tensor | None = None

    def __call__(
        self,
        x_BSD: Tensor,
        key_tokens: Sequence[Tensor],
        value_tokens: Sequence[Tensor],
        *,
        theta: str,
        scale_base: int,
        rows: RowReduction,
        recompute_scores: bool = False,
    ) -> Tensor:
        """Computes each projection [J, B, S, N] from the values of each position's strongest tokens."""
        if self._lengths is None:
            self._lengths = torch.stack([torch.linalg.vector_norm(values, dim=-1) for values in value_tokens])
        x_RD = x_BSD.flatten(0, -2)
        a_RJp = torch.stack([x_RD @ keys.T for keys in key_tokens], dim=1)
        normal = THETAS[theta]
        h_RJp = normal.weights(a_RJp, normal.statistic(a_RJp, scale_base, rows), scale_base)
        is_chosen_RJp = self._choose(h_RJp.abs() * self._lengths, rows)
        self.reads.add(is_chosen_RJp)
        read_RJp = (h_RJp * is_chosen_RJp).to(x_BSD.dtype)
        y_JRN = torch.stack([read_RJp[:, index] @ values for index, values in enumerate(value_tokens)])
        return y_JRN.view(len(key_tokens), *x_BSD.shape[:-1], -1)

    def _choose(self, strengths_RJp: Tensor, rows: RowReduction) -> Tensor:
        """Tells which tokens are among the strongest over all ranks; tokens as strong as the last one are, too."""
        blocks_RJb = strengths_RJp.view(*strengths_RJp.shape[:-1], -1, self.block).sum(-1)
        own = blocks_RJb.shape[-1]
        everywhere = own * rows.gather(strengths_RJp.new_zeros((1, 1, 1))).shape[-1]
        wanted = self._blocks(everywhere)
        candidates = rows.gather(blocks_RJb.topk(min(wanted, own), dim=-1).values)
        weakest_RJ1 = candidates.topk(min(wanted, candidates.shape[-1]), dim=-1).values[..., -1:]
        is_chosen_RJb: Tensor = blocks_RJb >= weakest_RJ1
        return is_chosen_RJb.repeat_interleave(self.block, dim=-1)

    def _blocks(self, everywhere: int) -> int:
        """Returns how many of a Pattention's blocks a position reads, one at least."""
        if isinstance(self.top_k, int):
            return min(self.top_k // self.block, everywhere)
        return max(round(self.top_k * everywhere), 1)
