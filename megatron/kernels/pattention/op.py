"""Pattention with its closed-form gradient: several projections of one input at once, saving scores and no weights.

Shape letters: R rows (tokens of the batch), J projections, p parameter tokens on this rank, D input, N output.
Reference: megatron/kernels/pattention/reference.py. Tested in tests/unit/kernels/test_pattention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.pattention.theta import THETAS, RowReduction, Theta


def pattention(
    x: Tensor,
    key_tokens: Sequence[Tensor],
    value_tokens: Sequence[Tensor],
    *,
    theta: str,
    scale_base: int,
    rows: RowReduction,
) -> Tensor:
    """Theta(X K_j^T) V_j for each projection j: x [..., D], K_j [p, D], V_j [p, N] to [J, ..., N].

    The scores of all projections are one matrix product. `rows` completes row statistics where other ranks hold
    further parameter tokens; the result is then this rank's summand. Statistics are float32, or float64 for float64.
    """
    x_RD = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        y_JRN: Tensor = _Pattention.apply(  # type: ignore[no-untyped-call]
            x_RD, THETAS[theta], scale_base, rows, *key_tokens, *value_tokens
        )
    else:
        y_JRN = _without_gradient(x_RD, THETAS[theta], scale_base, rows, key_tokens, value_tokens)
    return y_JRN.view(len(key_tokens), *x.shape[:-1], -1)


def _without_gradient(
    x_RD: Tensor,
    theta: Theta,
    scale_base: int,
    rows: RowReduction,
    key_tokens: Sequence[Tensor],
    value_tokens: Sequence[Tensor],
) -> Tensor:
    """One product per projection: to join the tokens would take longer than to multiply them with a few rows."""
    num, p = len(key_tokens), len(key_tokens[0])
    a_RJp = x_RD.new_empty((len(x_RD), num, p))
    for index, key_pD in enumerate(key_tokens):
        torch.mm(x_RD, key_pD.T, out=a_RJp[:, index])
    h_RJp = theta.weights(a_RJp, theta.statistic(a_RJp, scale_base, rows), scale_base).to(x_RD.dtype)
    y_JRN = x_RD.new_empty((num, len(x_RD), value_tokens[0].shape[1]))
    for index, value_pN in enumerate(value_tokens):
        torch.mm(h_RJp[:, index], value_pN, out=y_JRN[index])
    return y_JRN


class _Pattention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, theta: Theta, scale_base: int, rows: RowReduction, *tokens: Tensor) -> Tensor:
        num = len(tokens) // 2
        ctx.theta, ctx.scale_base, ctx.rows, ctx.num = theta, scale_base, rows, num
        a_RJp = (x_RD @ _joined(tokens[:num]).T).view(x_RD.shape[0], num, -1)
        statistic_RJk = theta.statistic(a_RJp, scale_base, rows)
        h_RJp = theta.weights(a_RJp, statistic_RJk, scale_base).to(x_RD.dtype)
        ctx.save_for_backward(x_RD, a_RJp, statistic_RJk, *tokens)
        return torch.bmm(h_RJp.transpose(0, 1), _stacked(tokens[num:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_JRN: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, a_RJp, statistic_RJk, *tokens = ctx.saved_tensors
        theta, num = ctx.theta, ctx.num
        dh_RJp = torch.empty_like(a_RJp)
        torch.bmm(dy_JRN, _stacked(tokens[num:]).transpose(1, 2), out=dh_RJp.transpose(0, 1))
        h_RJp, da_RJp = theta.gradient(dh_RJp, a_RJp, statistic_RJk, scale_base=ctx.scale_base, rows=ctx.rows)
        dv_JpN = torch.bmm(h_RJp.to(x_RD.dtype).permute(1, 2, 0), dy_JRN)
        da_RP = da_RJp.to(x_RD.dtype).view(x_RD.shape[0], -1)
        dk_PD = da_RP.T @ x_RD
        dx_RD = da_RP @ _joined(tokens[:num]) if ctx.needs_input_grad[0] else None
        return dx_RD, None, None, None, *dk_PD.chunk(num), *dv_JpN.unbind()


def _joined(tokens: Sequence[Tensor]) -> Tensor:
    """[J p, D] without a copy for a single projection."""
    return tokens[0] if len(tokens) == 1 else torch.cat(tuple(tokens))


def _stacked(tokens: Sequence[Tensor]) -> Tensor:
    """[J, p, N] without a copy for a single projection."""
    return tokens[0].unsqueeze(0) if len(tokens) == 1 else torch.stack(tuple(tokens))
