"""Floating-point operations per token, from the configuration alone.

A multiplication and an addition count as two. Counted are the matrix products: weights, attention between the tokens
of the sequence, and the head. Norms, activations and the embedding lookup are not. Attention counts all pairs of
positions, also those that the causal mask hides: the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311,
appendix B), in which most model FLOPs utilizations are published. With only the pairs that are not hidden, a
utilization would be lower: by a tenth for a TokenFormer of 150M parameters on 2048 tokens, by less for wider models.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.sections.model import ModelConfig
from megatron.model.layer_spec import ARCHITECTURES


@dataclass(frozen=True)
class ForwardFlops:
    """Forward pass [FLOP per token]; the mean over the positions of a sequence."""

    layers: int
    """Products with the weights of the transformer layers."""
    attention: int
    """Queries with keys and probabilities with values: 4 L d S."""
    head: int
    """Logits over the padded vocabulary."""

    @property
    def total(self) -> int:
        """Sum of the parts [FLOP per token]."""
        return self.layers + self.attention + self.head


def forward_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> ForwardFlops:
    """FLOPs per token of a forward pass over sequences of `seq_length` tokens."""
    per_layer = ARCHITECTURES[model.architecture](model).layer_matmul_parameters(model)
    return ForwardFlops(
        layers=2 * model.num_layers * per_layer,
        attention=4 * model.num_layers * model.hidden_size * seq_length,
        head=2 * padded_vocab_size * model.hidden_size,
    )


def training_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> int:
    """FLOPs per token of a forward and a backward pass, three times the forward; recomputation is not counted."""
    return 3 * forward_flops(model, padded_vocab_size, seq_length).total
