"""Pattention with its closed-form gradient: several projections of one input at once, saving scores and no weights.

What backends differ in is Theta's way over the rows of scores, a `RowPasses`; the matrix products and what is saved for
the backward pass are here.

Shape letters: see megatron/README.md; k counts the numbers of a row statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.pattention.pattention import PattentionFunction
from megatron.kernels.pattention.theta import RowReduction


class RowPasses(Protocol):
    """One Theta's passes over rows of scores: each reads a row once and completes its statistic where ranks share it.

    Scores, weights and their gradients have one dtype; statistics are float32, or float64 for float64.
    """

    def weigh(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> tuple[Tensor, Tensor]:
        """Computes h = Theta(a) [R, J, p] and the row statistic [R, J, k] that `differentiate` needs."""

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
        """Computes h once more, and da = dL/da from g = dL/dh [R, J, p].

        da may take the memory of g; h that of a too, where nobody will read the scores again (`scores_are_spent`).
        """


def closed_form_pattention(passes_of: Callable[[str], RowPasses]) -> PattentionFunction:
    """Returns Pattention by the closed-form gradient, with the row passes that `passes_of` makes for each Theta."""
    passes_of = cache(passes_of)

    def pattention(
        x_BSD: Tensor,
        key_tokens: Sequence[Tensor],
        value_tokens: Sequence[Tensor],
        *,
        theta: str,
        scale_base: int,
        rows: RowReduction,
        recompute_scores: bool = False,
    ) -> Tensor:
        """Computes the scores of all projections in one matrix product; see `PattentionFunction`."""
        x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
        passes = passes_of(theta)
        if torch.is_grad_enabled():
            y_JRN: Tensor = _Pattention.apply(  # type: ignore[no-untyped-call]
                x_RD, passes, scale_base, rows, recompute_scores, *key_tokens, *value_tokens
            )
        else:
            y_JRN = _without_gradient(x_RD, passes, scale_base, rows, key_tokens, value_tokens)
        return y_JRN.view(len(key_tokens), *x_BSD.shape[:-1], -1)

    return pattention


def _without_gradient(
    x_RD: Tensor,
    passes: RowPasses,
    scale_base: int,
    rows: RowReduction,
    key_tokens: Sequence[Tensor],
    value_tokens: Sequence[Tensor],
) -> Tensor:
    """Multiplies once per projection: to join the tokens would take longer than to multiply them with a few rows."""
    num_projections, num_tokens = len(key_tokens), len(key_tokens[0])
    a_RJp = x_RD.new_empty((len(x_RD), num_projections, num_tokens))
    for index, key_pD in enumerate(key_tokens):
        torch.mm(x_RD, key_pD.T, out=a_RJp[:, index])
    h_RJp, _ = passes.weigh(a_RJp, scale_base, rows)
    y_JRN = x_RD.new_empty((num_projections, len(x_RD), value_tokens[0].shape[1]))
    for index, value_pN in enumerate(value_tokens):
        torch.mm(h_RJp[:, index], value_pN, out=y_JRN[index])
    return y_JRN


class _Pattention(torch.autograd.Function):
    """Forward and backward pass of several projections."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        passes: RowPasses,
        scale_base: int,
        rows: RowReduction,
        recompute_scores: bool,
        *tokens: Tensor,
    ) -> Tensor:
        num_projections = len(tokens) // 2
        ctx.passes, ctx.scale_base, ctx.rows, ctx.num_projections = passes, scale_base, rows, num_projections
        a_RJp = _scores(x_RD, tokens[:num_projections])
        h_RJp, statistic_RJk = passes.weigh(a_RJp, scale_base, rows)
        ctx.save_for_backward(x_RD, None if recompute_scores else a_RJp, statistic_RJk, *tokens)
        return torch.bmm(h_RJp.transpose(0, 1), _stacked(tokens[num_projections:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_JRN: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, saved_RJp, statistic_RJk, *tokens = ctx.saved_tensors
        num_projections = ctx.num_projections
        keys, values = tokens[:num_projections], tokens[num_projections:]
        a_RJp = _scores(x_RD, keys) if saved_RJp is None else saved_RJp
        dh_RJp = torch.empty_like(a_RJp)
        torch.bmm(dy_JRN, _stacked(values).transpose(1, 2), out=dh_RJp.transpose(0, 1))
        h_RJp, da_RJp = ctx.passes.differentiate(
            dh_RJp,
            a_RJp,
            statistic_RJk,
            scale_base=ctx.scale_base,
            rows=ctx.rows,
            scores_are_spent=saved_RJp is None or not _graph_is_kept(),
        )
        da_joined = da_RJp.flatten(1)
        dx_RD = None
        if ctx.needs_input_grad[0]:
            dx_RD = da_joined @ _joined(keys)
            # It may travel while the gradients of the tokens are computed.
            ctx.rows.begin_gradient(dx_RD)
        dv_JpN = torch.bmm(h_RJp.permute(1, 2, 0), dy_JRN)
        dk_joined = da_joined.T @ x_RD
        return dx_RD, None, None, None, None, *dk_joined.chunk(num_projections), *dv_JpN.unbind()


def _scores(x_RD: Tensor, keys: Sequence[Tensor]) -> Tensor:
    return (x_RD @ _joined(keys).T).view(x_RD.shape[0], len(keys), -1)


def _graph_is_kept() -> bool:
    """Tells whether the backward pass may be asked for again (`retain_graph`), so that what is saved must last."""
    # The question that torch's own compiled backward passes ask before they reuse saved memory.
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def _joined(tokens: Sequence[Tensor]) -> Tensor:
    """Returns the tokens of all projections one after the other [J p, D], without a copy for a single projection."""
    return tokens[0] if len(tokens) == 1 else torch.cat(tuple(tokens))


def _stacked(tokens: Sequence[Tensor]) -> Tensor:
    """Returns the tokens of all projections [J, p, N], without a copy for a single projection."""
    return tokens[0].unsqueeze(0) if len(tokens) == 1 else torch.stack(tuple(tokens))
