"""GPT-2 (Radford et al. 2019), its positions apart, which the embedding adds."""

from __future__ import annotations

from megatron.config.sections.model import ModelConfig
from megatron.model.attention import LinearSelfAttention
from megatron.model.layer_spec import ARCHITECTURES, TransformerLayerSpec
from megatron.model.mlp import MLP
from megatron.model.norms import NORMS


@ARCHITECTURES.register("gpt2")
def gpt2_layer(model: ModelConfig) -> TransformerLayerSpec:
    """Builds a layer of linear projections and a two-matrix MLP."""
    return TransformerLayerSpec(norm=NORMS[model.norm], attention=LinearSelfAttention, mlp=MLP)
