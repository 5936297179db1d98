"""Pattention with its closed-form gradient: several projections of one input at once, saving scores and no weights.

Shape letters: see megatron/README.md; k counts the numbers of a row statistic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.kernels.backends import Backend
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS, RowReduction, Theta


def pattention(
    x_BSD: Tensor,
    key_tokens: Sequence[Tensor],
    value_tokens: Sequence[Tensor],
    *,
    theta: str,
    scale_base: int,
    rows: RowReduction,
) -> Tensor:
    """Computes Theta(X K_j^T) V_j for each projection j: x [B, S, D], K_j [p, D], V_j [p, N] to [J, B, S, N].

    The scores of all projections are one matrix product. `rows` completes row statistics where other ranks hold
    further parameter tokens; the result is then this rank's summand. Statistics are float32, or float64 for float64.
    """
    x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
    if torch.is_grad_enabled():
        y_JRN: Tensor = _Pattention.apply(  # type: ignore[no-untyped-call]
            x_RD, THETAS[theta], scale_base, rows, *key_tokens, *value_tokens
        )
    else:
        y_JRN = _without_gradient(x_RD, THETAS[theta], scale_base, rows, key_tokens, value_tokens)
    return y_JRN.view(len(key_tokens), *x_BSD.shape[:-1], -1)


def _without_gradient(
    x_RD: Tensor,
    theta: Theta,
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
    h_RJp = theta.weights(a_RJp, theta.statistic(a_RJp, scale_base, rows), scale_base).to(x_RD.dtype)
    y_JRN = x_RD.new_empty((num_projections, len(x_RD), value_tokens[0].shape[1]))
    for index, value_pN in enumerate(value_tokens):
        torch.mm(h_RJp[:, index], value_pN, out=y_JRN[index])
    return y_JRN


class _Pattention(torch.autograd.Function):
    """Forward and backward pass of several projections."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, theta: Theta, scale_base: int, rows: RowReduction, *tokens: Tensor) -> Tensor:
        num_projections = len(tokens) // 2
        ctx.theta, ctx.scale_base, ctx.rows, ctx.num_projections = theta, scale_base, rows, num_projections
        a_RJp = (x_RD @ _joined(tokens[:num_projections]).T).view(x_RD.shape[0], num_projections, -1)
        statistic_RJk = theta.statistic(a_RJp, scale_base, rows)
        h_RJp = theta.weights(a_RJp, statistic_RJk, scale_base).to(x_RD.dtype)
        ctx.save_for_backward(x_RD, a_RJp, statistic_RJk, *tokens)
        return torch.bmm(h_RJp.transpose(0, 1), _stacked(tokens[num_projections:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_JRN: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, a_RJp, statistic_RJk, *tokens = ctx.saved_tensors
        theta, num_projections = ctx.theta, ctx.num_projections
        dh_RJp = torch.empty_like(a_RJp)
        torch.bmm(dy_JRN, _stacked(tokens[num_projections:]).transpose(1, 2), out=dh_RJp.transpose(0, 1))
        h_RJp, da_RJp = theta.gradient(dh_RJp, a_RJp, statistic_RJk, scale_base=ctx.scale_base, rows=ctx.rows)
        dv_JpN = torch.bmm(h_RJp.to(x_RD.dtype).permute(1, 2, 0), dy_JRN)
        da_joined = da_RJp.to(x_RD.dtype).flatten(1)
        dk_joined = da_joined.T @ x_RD
        dx_RD = da_joined @ _joined(tokens[:num_projections]) if ctx.needs_input_grad[0] else None
        return dx_RD, None, None, None, *dk_joined.chunk(num_projections), *dv_JpN.unbind()


def _joined(tokens: Sequence[Tensor]) -> Tensor:
    """Returns the tokens of all projections one after the other [J p, D], without a copy for a single projection."""
    return tokens[0] if len(tokens) == 1 else torch.cat(tuple(tokens))


def _stacked(tokens: Sequence[Tensor]) -> Tensor:
    """Returns the tokens of all projections [J, p, N], without a copy for a single projection."""
    return tokens[0].unsqueeze(0) if len(tokens) == 1 else torch.stack(tuple(tokens))


PATTENTION.register("autograd")(Backend(label="closed-form gradient", rank=0, load=lambda: pattention))
