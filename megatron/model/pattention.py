"""Pattention, split by parameter tokens over tensor-parallel ranks, and the TokenFormer sublayers made of it.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.model import ModelConfig
from megatron.kernels.pattention.pattention import PATTENTION, PattentionFunction
from megatron.kernels.pattention.theta import RowReduction
from megatron.model.attention import SelfAttention
from megatron.model.init_methods import input_initializer, output_initializer
from megatron.mpu import collectives
from megatron.mpu.context import ParallelContext
from megatron.mpu.input_exchange import InputExchange, residual_exchange
from megatron.mpu.parameters import new_parameter


class Pattention(nn.Module):
    """Attention from tokens of the sequence to learnable parameter tokens; stands in for a linear layer.

        A = X K^T,   Y = Theta(A) V     (Wang et al. 2024, arXiv:2410.23168, equation 4)

    Each tensor-parallel rank holds p = P / tp of the P tokens: K [p, D] and V [p, D]. `scale_base` is the token count
    that sets the scale of Theta; it is configuration, so that appending tokens does not change it.

    While growth by mask_ramp opens, the scores of new tokens are m A instead of A, which is what keys m K give. In
    elastic training a step may read a share of the tokens: the sums of Theta then run over those, under the same scale.
    """

    def __init__(self, model: ModelConfig, num_tokens: int, scale_base: int, context: ParallelContext) -> None:
        super().__init__()
        tokens = param_tokens(model)
        self.theta = tokens.theta
        self.scale_base = scale_base
        self.kernel: PattentionFunction = PATTENTION["eager"].load()
        self.recompute_scores = False
        self.context = context
        shape, what = (num_tokens, model.hidden_size), "parameter tokens"
        self.key_tokens = new_parameter(shape, input_initializer(model), context, what=what, shard_dim=0)
        self.value_tokens = new_parameter(shape, output_initializer(model), context, what=what, shard_dim=0)
        self._opening: tuple[int, Tensor] | None = None
        self._share: tuple[int, int] | None = None

    def open_scores(self, old_tokens: int, multiplier: float) -> None:
        """Multiplies the scores of this rank's tokens beyond the first `old_tokens` by `multiplier` from now on."""
        if multiplier == 1.0 or old_tokens == len(self.key_tokens):
            self._opening = None
        elif self._opening is None:
            # A tensor: a compiled layer would be compiled anew for every other number. Its one element takes no part in
            # the choice of a number format.
            number = torch.tensor(multiplier, dtype=torch.float64, device=self.key_tokens.device)
            self._opening = (old_tokens, number)
        else:
            self._opening[1].fill_(multiplier)

    def read_share(self, groups: int, tokens_of_each: int) -> None:
        """Reads the first `tokens_of_each` of each of this rank's `groups` equal groups of tokens from now on."""
        is_whole = groups * tokens_of_each == len(self.key_tokens)
        self._share = None if is_whole else (groups, tokens_of_each)

    def scoring_keys(self) -> Tensor:
        """Returns the keys [p, D] whose products with the input are the scores; fewer where a share is read."""
        if self._opening is None:
            return self._shared(self.key_tokens)
        old_tokens, multiplier = self._opening
        return self._shared(torch.cat([self.key_tokens[:old_tokens], self.key_tokens[old_tokens:] * multiplier]))

    def weighed_values(self) -> Tensor:
        """Returns the values [p, D] that go with these keys."""
        return self._shared(self.value_tokens)

    def _shared(self, tokens_pD: Tensor) -> Tensor:
        """Returns the rows of the share: a view where they lie together, which those of one group do."""
        if self._share is None:
            return tokens_pD
        groups, tokens_of_each = self._share
        return tokens_pD.view(groups, -1, tokens_pD.shape[1])[:, :tokens_of_each].flatten(0, 1)

    def to_residual(self, x: Tensor, exchange: InputExchange) -> Tensor:
        """Maps the input, of which `exchange` makes the whole sequence [B, S, D], to the residual stream."""
        return collectives.to_residual(partial_outputs(x, exchange, [self])[0], self.context)


class PattentionMLP(Pattention):
    """The feed-forward sublayer: one Pattention from the residual stream to the residual stream."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.to_residual(x_BSD, residual_exchange(self.context))


class PattentionSelfAttention(SelfAttention):
    """Self-attention whose query, key, value and output projections are Pattentions."""

    def __init__(self, model: ModelConfig, context: ParallelContext, layer_index: int) -> None:
        super().__init__(model, context, layer_index)
        tokens = param_tokens(model)
        self.query, self.key, self.value = (
            Pattention(model, tokens.qkv, tokens.qkv_scale_base, context) for _ in range(3)
        )
        self.proj = Pattention(model, tokens.proj, tokens.proj_scale_base, context)

    def project_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projections = [self.query, self.key, self.value]
        summands_JBSD = partial_outputs(x_BSD, residual_exchange(self.context), projections)
        qkv_JBSN = collectives.reduce_scatter(summands_JBSD, -1, self.context)
        q_BSHE, k_BSHE, v_BSHE = rearrange(qkv_JBSN, "J B S (H E) -> J B S H E", E=self.head_size).unbind()
        return q_BSHE, k_BSHE, v_BSHE

    def project_output(self, o_BSN: Tensor) -> Tensor:
        return self.proj.to_residual(o_BSN, InputExchange(self.context, 2))


def partial_outputs(x: Tensor, exchange: InputExchange, projections: Sequence[Pattention]) -> Tensor:
    """Computes this rank's summands [J, B, S, D] of several Pattentions of one input, which `exchange` makes whole.

    They share theta, scale, kernel and context.
    """
    first = projections[0]
    return first.kernel(
        exchange.whole(x),
        [projection.scoring_keys() for projection in projections],
        [projection.weighed_values() for projection in projections],
        theta=first.theta,
        scale_base=first.scale_base,
        rows=row_reduction(first.context, exchange),
        recompute_scores=first.recompute_scores,
    )


def row_reduction(context: ParallelContext, exchange: InputExchange) -> RowReduction:
    """Returns the sums over the ranks that hold the other parameter tokens: of row statistics, of input gradients."""
    if context.tensor_size == 1:
        return RowReduction()
    return RowReduction(
        sum=partial(collectives.sum_over_ranks, context=context),
        max=partial(collectives.max_over_ranks, context=context),
        gather=partial(collectives.gather_output, dim=-1, context=context),
        begin_gradient=exchange.begin,
    )
