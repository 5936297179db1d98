"""Embedding from token ids to the residual stream, and head from there to logits.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.init_methods import input_initializer
from megatron.model.layer import HiddenDropout
from megatron.mpu.collectives import from_residual
from megatron.mpu.context import ParallelContext
from megatron.mpu.layers import VocabParallelEmbedding
from megatron.mpu.parameters import new_parameter


class TokenEmbedding(nn.Module):
    """Word embeddings and dropout: token ids [B, S] to the residual stream [B, S or S/tp, D]."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, context: ParallelContext) -> None:
        super().__init__()
        initializer = input_initializer(model)
        self.word_embeddings = VocabParallelEmbedding(padded_vocab_size, model.hidden_size, initializer, context)
        self.dropout = HiddenDropout(model.hidden_dropout, context)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.dropout(self.word_embeddings(tokens_BS))
        return x_BSD


class Head(nn.Module):
    """Projection of the residual stream to logits [B, S, V/tp] through a matrix of its own."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        shape = (padded_vocab_size, model.hidden_size)
        self.weight = new_parameter(shape, input_initializer(model), context, what="padded vocabulary", shard_dim=0)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return logits(x_BSD, self.weight, self.context)


class TiedHead(nn.Module):
    """Head that is tied to the word embeddings: a copy of them, for another pipeline stage."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, context: ParallelContext) -> None:
        super().__init__()
        initializer = input_initializer(model)
        self.word_embeddings = VocabParallelEmbedding(padded_vocab_size, model.hidden_size, initializer, context)


def tied_logits(embedding: TokenEmbedding | TiedHead, x_BSD: Tensor) -> Tensor:
    """Computes logits [B, S, V/tp] from the residual stream through the embedding matrix."""
    return logits(x_BSD, embedding.word_embeddings.weight, embedding.word_embeddings.context)


def head_factors(head: Head | TokenEmbedding | TiedHead, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the logits are the product of: the whole sequence x [B, S, D], and the head's matrix [V/tp, D].

    The matrix is a view: both pass through the graph, where DeepSpeed learns from them that the backward pass begins.
    """
    owner = head if isinstance(head, Head) else head.word_embeddings
    return from_residual(x_BSD, owner.context), owner.weight.view_as(owner.weight)


def logits(x_BSD: Tensor, weight_vD: Tensor, context: ParallelContext) -> Tensor:
    """Computes x W^T over this rank's rows of the vocabulary, for the whole sequence."""
    return F.linear(from_residual(x_BSD, context), weight_vD)
