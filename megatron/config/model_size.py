"""A model's size, from the configuration alone: trainable parameters, and floating-point operations per token.

Both follow from the same facts of its architecture. Of operations, a multiplication and an addition count as two.
Counted are the matrix products: weights, attention between the tokens of the sequence, and the head. Norms, activations
and the embedding lookup are not. Attention counts all pairs of positions, also those that the causal mask hides: the
convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), in which most model FLOPs utilizations are
published. With only the pairs that are not hidden, a utilization would be lower: by a tenth for a TokenFormer of 150M
parameters on 2048 tokens, by less for wider models.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.model import ModelConfig, Norm


def count_parameters(model: ModelConfig, padded_vocab_size: int) -> int:
    """Counts the trainable parameters of the whole model; a tied head counts once."""
    facts, hidden = ARCHITECTURES[model.architecture], model.hidden_size
    layer = facts.layer_matrices(model) + facts.layer_biases(model) + 2 * norm_parameters(model.norm, model)
    embeddings = padded_vocab_size * hidden * (1 if model.tie_embeddings else 2)
    if model.pos_emb == "learned":
        embeddings += model.max_position_embeddings * hidden
    return embeddings + model.num_layers * layer + norm_parameters(model.final_norm or model.norm, model)


def norm_parameters(norm: Norm, model: ModelConfig) -> int:
    """Counts the parameters of one norm."""
    vectors = {"layernorm": 1 + model.use_bias_in_norms, "rmsnorm": 1, "layernorm_nonparam": 0}[norm]
    return vectors * model.hidden_size


@dataclass(frozen=True)
class ForwardFlops:
    """Forward pass [FLOP per token]; the mean over the positions of a sequence."""

    layers: int
    """Products with the weights of the transformer layers."""
    attention: int
    """Queries with keys and probabilities with values: 4 L D S."""
    head: int
    """Logits over the padded vocabulary."""

    @property
    def total(self) -> int:
        """Returns the sum of the parts [FLOP per token]."""
        return self.layers + self.attention + self.head


def forward_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> ForwardFlops:
    """Counts the operations per token of a forward pass over sequences of `seq_length` tokens."""
    return ForwardFlops(
        layers=2 * model.num_layers * ARCHITECTURES[model.architecture].layer_matrices(model),
        attention=4 * model.num_layers * model.hidden_size * seq_length,
        head=2 * padded_vocab_size * model.hidden_size,
    )


def training_flops(model: ModelConfig, padded_vocab_size: int, seq_length: int) -> int:
    """Counts the operations per token of a forward and a backward pass: three times the forward.

    Recomputation is not counted.
    """
    return 3 * forward_flops(model, padded_vocab_size, seq_length).total
