"""TokenFormer (Wang et al. 2024, arXiv:2410.23168): every projection, and the MLP, is a Pattention."""

from __future__ import annotations

from megatron.config.sections.model import ModelConfig
from megatron.model.layer_spec import ARCHITECTURES, TransformerLayerSpec
from megatron.model.norms import NORMS
from megatron.model.pattention import PattentionMLP, PattentionSelfAttention, param_tokens
from megatron.mpu.context import ParallelContext


@ARCHITECTURES.register("tokenformer")
def tokenformer_layer(model: ModelConfig) -> TransformerLayerSpec:
    """Builds a layer of four Pattentions in attention and one as the MLP."""
    return TransformerLayerSpec(
        norm=NORMS[model.norm],
        attention=PattentionSelfAttention,
        mlp=_mlp,
        layer_matmul_parameters=_matmul_parameters,
    )


def _mlp(model: ModelConfig, context: ParallelContext) -> PattentionMLP:
    tokens = param_tokens(model)
    return PattentionMLP(model, tokens.ffn, tokens.ffn_scale_base, context)


def _matmul_parameters(model: ModelConfig) -> int:
    tokens = param_tokens(model)
    return 2 * model.hidden_size * (3 * tokens.qkv + tokens.proj + tokens.ffn)
