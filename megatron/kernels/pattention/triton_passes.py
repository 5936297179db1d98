"""Theta's passes over rows by Triton: a program for each row, the row in registers, or block by block where it is long.

Without other ranks a pass is one kernel. With them it is two, between which the row's sums are completed.

Shape letters: see megatron/README.md; k is 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.kernels.pattention.theta import RowReduction, wide_dtype
from megatron.kernels.pattention.triton_theta import TRITON_THETAS

LARGEST_ROW = 8192
"""Scores of a row that stay in registers; ahead-of-time compilation finds no spills up to here. It is the block of
longer rows too."""
SCORES_PER_THREAD = 16
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


class TritonPasses:
    """The row passes of one Theta. da takes the memory of g, and h that of the scores where these are spent."""

    def __init__(self, theta: str) -> None:
        self.theta = TRITON_THETAS[theta]

    def weigh(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> tuple[Tensor, Tensor]:
        """Computes h [R, J, p] and the row's sums [R, J, 2]."""
        h_RJp = torch.empty_like(a_RJp)
        sums_RJk = a_RJp.new_empty((*a_RJp.shape[:-1], 2), dtype=wide_dtype(a_RJp))
        if rows == RowReduction():
            self._forward(a_RJp, h_RJp, sums_RJk, scale_base, accumulate=True, weigh=True)
        else:
            self._forward(a_RJp, h_RJp, sums_RJk, scale_base, accumulate=True, weigh=False)
            sums_RJk = self.theta.complete(sums_RJk, rows).contiguous()
            self._forward(a_RJp, h_RJp, sums_RJk, scale_base, accumulate=False, weigh=True)
        return h_RJp, sums_RJk

    def differentiate(
        self,
        g_RJp: Tensor,
        a_RJp: Tensor,
        statistic_RJk: Tensor,
        *,
        scale_base: int,
        rows: RowReduction,
        scores_are_spent: bool,
    ) -> tuple[Tensor, Tensor]:
        """Computes h and da [R, J, p]."""
        h_RJp = a_RJp if scores_are_spent else torch.empty_like(a_RJp)
        tensors = (g_RJp, a_RJp, h_RJp, statistic_RJk)
        sums_RJ = statistic_RJk.new_empty(a_RJp.shape[:-1])
        if rows == RowReduction():
            self._backward(*tensors, sums_RJ, scale_base, accumulate=True, differentiate=True)
        else:
            self._backward(*tensors, sums_RJ, scale_base, accumulate=True, differentiate=False)
            sums_RJ = rows.sum(sums_RJ.unsqueeze(-1)).contiguous()
            self._backward(*tensors, sums_RJ, scale_base, accumulate=False, differentiate=True)
        return h_RJp, g_RJp

    def _forward(
        self, a_RJp: Tensor, h_RJp: Tensor, sums_RJk: Tensor, scale_base: int, *, accumulate: bool, weigh: bool
    ) -> None:
        num_rows, num_tokens = a_RJp.shape[:-1].numel(), a_RJp.shape[-1]
        theta = self.theta
        forward_rows[(num_rows,)](
            a_RJp,
            h_RJp,
            sums_RJk,
            num_tokens,
            scale_base,
            START=theta.start,
            ACCUMULATE=theta.accumulate if accumulate else None,
            FACTORS=theta.factors,
            WEIGHTS=theta.weights if weigh else None,
            **_row_options(num_tokens, sums_RJk.dtype),
        )

    def _backward(
        self,
        g_RJp: Tensor,
        a_RJp: Tensor,
        h_RJp: Tensor,
        statistic_RJk: Tensor,
        sums_RJ: Tensor,
        scale_base: int,
        *,
        accumulate: bool,
        differentiate: bool,
    ) -> None:
        num_rows, num_tokens = a_RJp.shape[:-1].numel(), a_RJp.shape[-1]
        theta = self.theta
        backward_rows[(num_rows,)](
            g_RJp,
            a_RJp,
            h_RJp,
            statistic_RJk,
            sums_RJ,
            num_tokens,
            scale_base,
            FACTORS=theta.factors,
            PRODUCT=theta.product if accumulate else None,
            WEIGHTS=theta.weights,
            GRADIENT=theta.gradient if differentiate else None,
            **_row_options(num_tokens, statistic_RJk.dtype),
        )


def _row_options(num_tokens: int, wide: torch.dtype) -> dict[str, Any]:
    """Returns what every kernel of rows is compiled with: how a row of `num_tokens` scores is read, and in what."""
    block, warps = launch_sizes(num_tokens)
    return {"WIDE": WIDE[wide], "WHOLE": num_tokens <= block, "BLOCK": block, "num_warps": warps}


def launch_sizes(num_tokens: int) -> tuple[int, int]:
    """Returns the block of a row of `num_tokens` scores, a power of two, and the warps that share it."""
    block = min(triton.next_power_of_2(num_tokens), LARGEST_ROW)
    return block, min(max(block // (32 * SCORES_PER_THREAD), 1), 16)


@triton.jit(do_not_specialize=["scale_base"])
def forward_rows(
    a_ptr,
    h_ptr,
    sums_ptr,
    num_tokens,
    scale_base,
    START: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    FACTORS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes a row's sums from its scores (unless ACCUMULATE is None: then reads them), and h (unless WEIGHTS is).

    a, h: [rows, num_tokens] contiguous, bf16, fp16, fp32 or fp64.  sums: [rows, 2] fp32 (fp64 for fp64), over all
    ranks' tokens where they are read. WHOLE: a row is one block. Math in fp32 (fp64).
    Reference: megatron/kernels/pattention/backends/reference.py, `definition` in megatron/kernels/pattention/thetas/
    Tested in: tests/unit/kernels/test_pattention.py, test_triton_pattention.py (outputs and gradients)
    """
    row = tl.program_id(0).to(tl.int64)
    a_row = a_ptr + row * num_tokens
    h_row = h_ptr + row * num_tokens
    columns = tl.arange(0, BLOCK)
    if WHOLE:
        inside = columns < num_tokens
        a = tl.load(a_row + columns, mask=inside, other=0.0).to(WIDE)
    if ACCUMULATE is None:
        first = tl.load(sums_ptr + 2 * row)
        second = tl.load(sums_ptr + 2 * row + 1)
    else:
        first = tl.full((), START, WIDE)
        second = tl.full((), 0.0, WIDE)
        if WHOLE:
            first, second = ACCUMULATE(first, second, a, inside)
        else:
            for begin in range(0, num_tokens, BLOCK):
                inside = begin + columns < num_tokens
                a = tl.load(a_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                first, second = ACCUMULATE(first, second, a, inside)
        tl.store(sums_ptr + 2 * row, first)
        tl.store(sums_ptr + 2 * row + 1, second)
    if WEIGHTS is not None:
        factor, other = FACTORS(first, second, scale_base.to(WIDE))
        if WHOLE:
            tl.store(h_row + columns, WEIGHTS(a, factor, other).to(h_ptr.dtype.element_ty), mask=inside)
        else:
            for begin in range(0, num_tokens, BLOCK):
                inside = begin + columns < num_tokens
                a = tl.load(a_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                h = WEIGHTS(a, factor, other).to(h_ptr.dtype.element_ty)
                tl.store(h_row + begin + columns, h, mask=inside)


@triton.jit(do_not_specialize=["scale_base"])
def backward_rows(
    g_ptr,
    a_ptr,
    h_ptr,
    statistic_ptr,
    sums_ptr,
    num_tokens,
    scale_base,
    FACTORS: tl.constexpr,
    PRODUCT: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Computes a row's sum of PRODUCT (unless that is None: then reads it), and h and da (unless GRADIENT is None).

    g, a, h: [rows, num_tokens] contiguous; da is written over g, and h may be a. statistic: [rows, 2] of
    `forward_rows`, sums: [rows], over all ranks' tokens. WHOLE: a row is one block. Math in fp32 (fp64).
    Reference: megatron/kernels/pattention/backends/reference.py under autograd
    Tested in: tests/unit/kernels/test_pattention.py, test_triton_pattention.py
    """
    row = tl.program_id(0).to(tl.int64)
    g_row = g_ptr + row * num_tokens
    a_row = a_ptr + row * num_tokens
    h_row = h_ptr + row * num_tokens
    columns = tl.arange(0, BLOCK)
    scale = scale_base.to(WIDE)
    factor, other = FACTORS(tl.load(statistic_ptr + 2 * row), tl.load(statistic_ptr + 2 * row + 1), scale)
    if WHOLE:
        inside = columns < num_tokens
        g = tl.load(g_row + columns, mask=inside, other=0.0).to(WIDE)
        a = tl.load(a_row + columns, mask=inside, other=0.0).to(WIDE)
    if PRODUCT is None:
        total = tl.load(sums_ptr + row)
    else:
        total = tl.full((), 0.0, WIDE)
        if WHOLE:
            total += tl.sum(tl.where(inside, PRODUCT(g, a, factor, other), 0.0), 0)
        else:
            for begin in range(0, num_tokens, BLOCK):
                inside = begin + columns < num_tokens
                g = tl.load(g_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                a = tl.load(a_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                total += tl.sum(tl.where(inside, PRODUCT(g, a, factor, other), 0.0), 0)
        if GRADIENT is None:
            tl.store(sums_ptr + row, total)
    if GRADIENT is not None:
        projection = total / scale
        if WHOLE:
            h = WEIGHTS(a, factor, other).to(h_ptr.dtype.element_ty)
            da = GRADIENT(g, a, projection, factor, other).to(g_ptr.dtype.element_ty)
            tl.store(h_row + columns, h, mask=inside)
            tl.store(g_row + columns, da, mask=inside)
        else:
            for begin in range(0, num_tokens, BLOCK):
                inside = begin + columns < num_tokens
                g = tl.load(g_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                a = tl.load(a_row + begin + columns, mask=inside, other=0.0).to(WIDE)
                h = WEIGHTS(a, factor, other).to(h_ptr.dtype.element_ty)
                da = GRADIENT(g, a, projection, factor, other).to(g_ptr.dtype.element_ty)
                tl.store(h_row + begin + columns, h, mask=inside)
                tl.store(g_row + begin + columns, da, mask=inside)
