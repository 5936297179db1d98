"""LLaMA (Touvron et al. 2023, arXiv:2302.13971)."""

from __future__ import annotations

from megatron.config.sections.model import ModelConfig
from megatron.model.attention import GroupedQueryAttention
from megatron.model.layer_spec import ARCHITECTURES, TransformerLayerSpec
from megatron.model.mlp import GatedMLP
from megatron.model.norms import NORMS


@ARCHITECTURES.register("llama")
def llama_layer(model: ModelConfig) -> TransformerLayerSpec:
    """Builds a layer of grouped-query attention and a gated MLP."""
    return TransformerLayerSpec(norm=NORMS[model.norm], attention=GroupedQueryAttention, mlp=GatedMLP)
