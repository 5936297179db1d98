"""TokenFormer (Wang et al. 2024, arXiv:2410.23168): every projection, and the MLP, is a Pattention."""

from __future__ import annotations

from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.sections.model import ModelConfig
from megatron.model.layer_spec import ARCHITECTURES, TransformerLayerSpec
from megatron.model.norms import NORMS
from megatron.model.pattention import PattentionMLP, PattentionSelfAttention
from megatron.mpu.context import ParallelContext


@ARCHITECTURES.register("tokenformer")
def tokenformer_layer(model: ModelConfig) -> TransformerLayerSpec:
    """Builds a layer of four Pattentions in attention and one as the MLP."""
    return TransformerLayerSpec(norm=NORMS[model.norm], attention=PattentionSelfAttention, mlp=_mlp)


def _mlp(model: ModelConfig, context: ParallelContext) -> PattentionMLP:
    tokens = param_tokens(model)
    return PattentionMLP(model, tokens.ffn, tokens.ffn_scale_base, context)
