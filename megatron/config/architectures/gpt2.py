"""GPT-2 (Radford et al. 2019): GPT-NeoX's layer in sequence, learned positions, and GeLU by its tanh approximation."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.config.architecture import ARCHITECTURES, ArchitectureFacts, FixedValue
from megatron.config.architectures.gpt_neox import LINEAR_OUTPUTS, layer_biases, layer_matrices
from megatron.config.yaml.problems import YamlValue


def is_gpt2(keys: Mapping[str, YamlValue]) -> bool:
    """Tells whether NeoX's keys describe a GPT-2: learned positions, and sublayers in sequence."""
    return keys.get("pos_emb") == "learned" and not keys.get("gpt_j_residual")


ARCHITECTURES.register("gpt2")(
    ArchitectureFacts(
        layer_matrices,
        layer_biases,
        attention_types=("flash", "global"),
        output_weights=LINEAR_OUTPUTS,
        defaults={"pos_emb": "learned", "activation": "gelu_tanh"},
        fixed={
            "pos_emb": FixedValue("learned", "GPT-2 has learned positions; use those, or architecture: gpt_neox"),
            "parallel_residual": FixedValue(
                False, "GPT-2's sublayers are sequential; use false, or architecture: gpt_neox with pos_emb: learned"
            ),
        },
        own_fields=("scale_attn_by_inverse_layer_idx",),
        is_implied_by=is_gpt2,
    )
)
