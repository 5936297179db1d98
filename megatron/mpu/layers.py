"""Linear layers and the token embedding, split over tensor-parallel ranks (Shoeybi et al. 2019, arXiv:1909.08053).

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext
from megatron.mpu.input_exchange import InputExchange, residual_exchange
from megatron.mpu.parameters import Initializer, new_parameter, zeros


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b from the residual stream, output features split: this rank has W [N, D] and y [B, S, N]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, initializer: Initializer, context: ParallelContext
    ) -> None:
        super().__init__()
        self.context = context
        what = "output features of a linear layer"
        self.weight = new_parameter((out_features, in_features), initializer, context, what=what, shard_dim=0)
        self.bias = (
            new_parameter((out_features,), zeros, context, what=what, shard_dim=0, decays=False) if bias else None
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        return column_parallel_outputs(x_BSD, [self])[0]


def column_parallel_outputs(x_BSD: Tensor, layers: Sequence[ColumnParallelLinear]) -> list[Tensor]:
    """Computes the outputs [B, S, N] of several layers of one input, for which the ranks exchange it once.

    In the backward pass they exchange its gradient while those of the weights are computed.
    """
    exchange = residual_exchange(layers[0].context)
    whole_BSD = exchange.whole(x_BSD)
    if layers[0].context.tensor_size == 1 or torch.compiler.is_compiling():
        return [F.linear(whole_BSD, layer.weight, layer.bias) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return list(_Linears.apply(whole_BSD, exchange, *weights, *biases))  # type: ignore[no-untyped-call]


class _Linears(torch.autograd.Function):
    """Linear layers of one input, whose gradient is computed, and sent, before those of the weights."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, exchange: InputExchange, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        ctx.exchange, ctx.has_bias = exchange, [bias is not None for bias in biases]
        ctx.save_for_backward(x_BSD, *weights)
        return tuple(F.linear(x_BSD, cast(Tensor, w_ND), b_N) for w_ND, b_N in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, *weights = ctx.saved_tensors
        x_RD, outputs = x_BSD.flatten(0, 1), [dy_BSN.flatten(0, 1) for dy_BSN in dy]
        dx_BSD = None
        if ctx.needs_input_grad[0]:
            # From the last layer on, as autograd adds.
            dx_RD = outputs[-1] @ weights[-1]
            for dy_RN, w_ND in zip(reversed(outputs[:-1]), reversed(weights[:-1]), strict=True):
                dx_RD += dy_RN @ w_ND
            ctx.exchange.begin(dx_RD)
            dx_BSD = dx_RD.view_as(x_BSD)
        dw = [dy_RN.T @ x_RD for dy_RN in outputs]
        db = [dy_RN.sum(0) if has_bias else None for dy_RN, has_bias in zip(outputs, ctx.has_bias, strict=True)]
        return dx_BSD, None, *dw, *db


class RowParallelLinear(nn.Module):
    """y = x W^T + b to the residual stream, input features split: this rank has x [B, S, N] and W [D, N]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, initializer: Initializer, context: ParallelContext
    ) -> None:
        super().__init__()
        self.context = context
        what = "input features of a linear layer"
        self.weight = new_parameter((out_features, in_features), initializer, context, what=what, shard_dim=1)
        self.bias = new_parameter((out_features,), zeros, context, what=what, decays=False) if bias else None

    def forward(self, x_BSN: Tensor) -> Tensor:
        y_BSD = collectives.to_residual(F.linear(x_BSN, self.weight), self.context)
        if self.bias is None:
            return y_BSD
        return y_BSD + collectives.residual_weight(self.bias, self.context)


class VocabParallelEmbedding(nn.Module):
    """Word embeddings, rows of the vocabulary split: weight [V/tp, D]; tokens [B, S] to the residual stream."""

    def __init__(self, vocab_size: int, hidden_size: int, initializer: Initializer, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.weight = new_parameter(
            (vocab_size, hidden_size),
            initializer,
            context,
            what="padded vocabulary",
            shard_dim=0,
            is_embedding_or_head=True,
        )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        if self.context.tensor_size == 1:
            return F.embedding(tokens_BS, self.weight)
        rows = self.weight.shape[0]
        local_BS = tokens_BS - self.context.tensor_rank * rows
        elsewhere_BS = (local_BS < 0) | (local_BS >= rows)
        x_BSD = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight)
        return collectives.to_residual(x_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0), self.context)
