"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), which Pythia is an instance of."""

from __future__ import annotations

from megatron.config.architecture import ARCHITECTURES, ArchitectureFacts
from megatron.config.sections.model import ModelConfig


def layer_matrices(model: ModelConfig) -> int:
    """Counts 4 D^2 weights in attention and 8 D^2 in the MLP."""
    return 12 * model.hidden_size**2


def layer_biases(model: ModelConfig) -> int:
    """Counts a bias for each output of the four attention projections and of the two MLP matrices."""
    attention = 4 if model.use_bias_in_attn_linear else 0
    mlp = 5 if model.use_bias_in_mlp else 0
    return (attention + mlp) * model.hidden_size


LINEAR_OUTPUTS = (
    "attention.dense.weight",
    "attention.dense.bias",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_4h_to_h.bias",
)
"""Parameters of a layer of linear projections that write to the residual stream."""

ARCHITECTURES.register("gpt_neox")(
    # Flash and global are the same function: the attention kernel is chosen elsewhere.
    ArchitectureFacts(
        layer_matrices,
        layer_biases,
        attention_types=("flash", "global"),
        output_weights=LINEAR_OUTPUTS,
    )
)
