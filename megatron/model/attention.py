"""Causal self-attention over heads that are split over tensor-parallel ranks.

Shape letters: see megatron/README.md. H and G count this rank's heads, and N = H E is the width of their outputs.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.kernels.attention.backends.sdpa import causal_attention
from megatron.kernels.attention.causal_attention import CausalAttention
from megatron.model.init_methods import input_initializer, output_initializer
from megatron.model.kv_cache import LayerCache
from megatron.model.positions import RotaryEmbedding
from megatron.mpu.context import ParallelContext
from megatron.mpu.layers import ColumnParallelLinear, RowParallelLinear, column_parallel_outputs
from megatron.mpu.parameters import shard_size
from megatron.mpu.random import split_activations


class SelfAttention(nn.Module):
    """Projection to heads, rotary positions, causal attention, output projection; subclasses own the projections.

    Residual stream [B, S or S/tp, D] in and out. `layer_index` is the layer's place in the whole model, from 0, of
    whichever pipeline stage it is. Raises ConfigError when the features do not split over the heads, or the heads over
    the ranks, or the query heads over those of keys and values.
    """

    def __init__(self, model: ModelConfig, context: ParallelContext, layer_index: int) -> None:
        super().__init__()
        if model.hidden_size % model.num_attention_heads:
            raise ConfigError(
                f"hidden_size={model.hidden_size} is not a multiple of num_attention_heads={model.num_attention_heads}."
            )
        kv_heads = model.num_kv_heads or model.num_attention_heads
        if model.num_attention_heads % kv_heads:
            raise ConfigError(
                f"num_attention_heads={model.num_attention_heads} is not a multiple of num_kv_heads={kv_heads}."
            )
        self.num_heads = shard_size(model.num_attention_heads, context, "num_attention_heads")
        self.num_kv_heads = shard_size(kv_heads, context, "num_kv_heads")
        self.context = context
        self.head_size = model.hidden_size // model.num_attention_heads
        self.dropout = model.attention_dropout
        self.scale = self.head_size**-0.5 / (layer_index + 1) if model.scale_attn_by_inverse_layer_idx else None
        self.core_attention: CausalAttention = causal_attention
        self.rotary = RotaryEmbedding(model)

    def forward(self, x_BSD: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attends among the tokens; with a cache, these follow the tokens that it has seen."""
        q_BSHE, k_BSGE, v_BSGE = self.project_heads(x_BSD)
        if cache is None:
            q_BSHE, k_BSGE = self.rotary(q_BSHE, k_BSGE)
            o_BSHE = self.attend(q_BSHE, k_BSGE, v_BSGE)
        else:
            q_BSHE, k_BSGE = self.rotary(q_BSHE, k_BSGE, cache.rotary_tables(self.rotary))
            o_BSHE = cache.attend(q_BSHE, k_BSGE, v_BSGE, self.core_attention, self.scale)
        return self.project_output(rearrange(o_BSHE, "B S H E -> B S (H E)"))

    def attend(self, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor) -> Tensor:
        """Computes causal attention [B, S, H, E] over this rank's heads, with dropout in training."""
        if not (self.training and self.dropout):
            return self.core_attention(q_BSHE, k_BSGE, v_BSGE, 0.0, self.scale)
        with split_activations(self.context):
            return self.core_attention(q_BSHE, k_BSGE, v_BSGE, self.dropout, self.scale)

    def project_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projects to the queries [B, S, H, E], keys and values [B, S, G, E] of this rank's heads."""
        raise NotImplementedError

    def project_output(self, o_BSN: Tensor) -> Tensor:
        """Projects the concatenated outputs of this rank's heads to the residual stream."""
        raise NotImplementedError


class LinearSelfAttention(SelfAttention):
    """Self-attention with linear projections. The fused weight keeps GPT-NeoX's row order: by head, then q, k, v."""

    def __init__(self, model: ModelConfig, context: ParallelContext, layer_index: int) -> None:
        super().__init__(model, context, layer_index)
        width, bias = model.hidden_size, model.use_bias_in_attn_linear
        self.query_key_value = ColumnParallelLinear(width, 3 * width, bias, input_initializer(model), context)
        self.dense = RowParallelLinear(width, width, bias, output_initializer(model), context)

    def project_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BSN: Tensor = self.query_key_value(x_BSD)
        q_BSHE, k_BSHE, v_BSHE = rearrange(qkv_BSN, "B S (H J E) -> B S H J E", J=3, E=self.head_size).unbind(3)
        return q_BSHE, k_BSHE, v_BSHE

    def project_output(self, o_BSN: Tensor) -> Tensor:
        x_BSD: Tensor = self.dense(o_BSN)
        return x_BSD


class GroupedQueryAttention(SelfAttention):
    """Self-attention with a matrix each for queries, keys and values, and maybe fewer heads of keys and values.

    Ainslie et al. 2023, arXiv:2305.13245.
    """

    def __init__(self, model: ModelConfig, context: ParallelContext, layer_index: int) -> None:
        super().__init__(model, context, layer_index)
        width, bias, initializer = model.hidden_size, model.use_bias_in_attn_linear, input_initializer(model)
        shared = self.head_size * (model.num_kv_heads or model.num_attention_heads)
        self.query = ColumnParallelLinear(width, width, bias, initializer, context)
        self.key = ColumnParallelLinear(width, shared, bias, initializer, context)
        self.value = ColumnParallelLinear(width, shared, bias, initializer, context)
        self.dense = RowParallelLinear(width, width, bias, output_initializer(model), context)

    def project_heads(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = column_parallel_outputs(x_BSD, [self.query, self.key, self.value])
        q_BSHE, k_BSGE, v_BSGE = (rearrange(y_BSN, "B S (H E) -> B S H E", E=self.head_size) for y_BSN in outputs)
        return q_BSHE, k_BSGE, v_BSGE

    def project_output(self, o_BSN: Tensor) -> Tensor:
        x_BSD: Tensor = self.dense(o_BSN)
        return x_BSD
