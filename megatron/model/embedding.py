"""Embedding from token ids to the residual stream, and head from there to logits.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.model.init_methods import input_initializer
from megatron.model.kv_cache import KeyValueCache
from megatron.model.layer import HiddenDropout
from megatron.mpu.collectives import from_residual, residual_weight
from megatron.mpu.context import ParallelContext
from megatron.mpu.layers import VocabParallelEmbedding
from megatron.mpu.parameters import new_parameter


class TokenEmbedding(nn.Module):
    """Word embeddings, learned positions where the model has them, and dropout.

    Token ids [B, S] to the residual stream [B, S or S/tp, D].
    """

    def __init__(self, model: ModelConfig, padded_vocab_size: int, context: ParallelContext) -> None:
        super().__init__()
        initializer = input_initializer(model)
        self.word_embeddings = VocabParallelEmbedding(padded_vocab_size, model.hidden_size, initializer, context)
        self.position_embeddings = LearnedPositions(model, context) if model.pos_emb == "learned" else None
        self.dropout = HiddenDropout(model.hidden_dropout, context)

    def forward(self, tokens_BS: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Embeds tokens; with a cache, these follow the tokens that it has seen."""
        x_BSD: Tensor = self.word_embeddings(tokens_BS)
        if self.position_embeddings is not None:
            x_BSD = x_BSD + self.position_embeddings(tokens_BS.shape[1], cache)
        dropped_BSD: Tensor = self.dropout(x_BSD)
        return dropped_BSD


class LearnedPositions(nn.Module):
    """A vector for each of the first max_position_embeddings positions, which is added to the token there.

    Every tensor-parallel rank has all of them, [max_position_embeddings, D].
    """

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        shape = (model.max_position_embeddings, model.hidden_size)
        self.weight = new_parameter(
            shape, input_initializer(model), context, what="learned positions", is_embedding_or_head=True
        )

    def forward(self, length: int, cache: KeyValueCache | None = None) -> Tensor:
        """Returns what this rank adds to the residual stream of `length` tokens, [B or 1, S or S/tp, D].

        With a cache, they follow those that it has seen. Raises ConfigError for a sequence of more tokens than there
        are positions.
        """
        longest = length if cache is None else cache.longest
        if longest > len(self.weight):
            raise ConfigError(
                f"max_position_embeddings: a sequence of {longest} tokens does not fit the model, which has learned "
                f"{len(self.weight)} positions and no more. Use at most {len(self.weight)} tokens, prompt and answer "
                "together."
            )
        weight = residual_weight(self.weight, self.context)
        if cache is not None:
            return F.embedding(cache.positions_BS, weight)
        if not self.context.sequence_parallel:
            return weight[:length].unsqueeze(0)
        share = length // self.context.tensor_size
        first = self.context.tensor_rank * share
        return weight[first : first + share].unsqueeze(0)


class Head(nn.Module):
    """Projection of the residual stream to logits [B, S, V/tp] through a matrix of its own."""

    def __init__(self, model: ModelConfig, padded_vocab_size: int, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        shape = (padded_vocab_size, model.hidden_size)
        self.weight = new_parameter(
            shape,
            input_initializer(model),
            context,
            what="padded vocabulary",
            shard_dim=0,
            is_embedding_or_head=True,
        )

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
