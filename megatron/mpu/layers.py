"""Linear layers and the token embedding, split over tensor-parallel ranks (Shoeybi et al. 2019, arXiv:1909.08053).

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext
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
    """Computes the outputs [B, S, N] of several layers of one input, for which the ranks exchange it once."""
    whole_BSD = collectives.from_residual(x_BSD, layers[0].context)
    return [F.linear(whole_BSD, layer.weight, layer.bias) for layer in layers]


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
