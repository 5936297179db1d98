"""TokenFormer for transformers, in one file that imports torch and transformers alone and ships with every export.

TokenFormer (Wang et al. 2024, arXiv:2410.23168) replaces every projection of a decoder, and its MLP, by Pattention:
attention from the tokens of the sequence to learnable parameter tokens. Needs transformers 5.

Shape letters: B batch, S sequence, T cached and new positions, D hidden size, H heads, E features of a head, r rotated
ones, P parameter tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple


class TokenFormerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and arithmetic of a TokenFormer; the defaults are those of the published 150M model.

    num_qkv_tokens, num_proj_tokens, num_ffn_tokens: parameter tokens of each query, key and value Pattention, of the
        attention output Pattention, and of the one that stands for the MLP.
    qkv_scale_base, proj_scale_base, ffn_scale_base: token counts that set the scale of the normalized scores. They
        are the current counts unless given; a model that was grown keeps those it had before.
    theta: normalization of the scores: "softmax", "gelu_l2_norm" or "l2_norm_gelu".
    norm, final_norm: "layernorm", "layernorm_nonparam" (no weights) or "rmsnorm".
    rotary_pct: share of each head's features that is rotated; 0 for a model without position embeddings.
    initializer_range: standard deviation of new embeddings and key tokens; new value tokens have 2 / (L sqrt(D)).
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_qkv_tokens: int = 768,
        num_proj_tokens: int = 768,
        num_ffn_tokens: int = 3072,
        qkv_scale_base: int | None = None,
        proj_scale_base: int | None = None,
        ffn_scale_base: int | None = None,
        theta: str = "l2_norm_gelu",
        norm: str = "layernorm_nonparam",
        final_norm: str = "layernorm",
        layer_norm_eps: float = 1e-5,
        rms_norm_eps: float = 1e-8,
        rotary_pct: float = 0.25,
        rotary_emb_base: float = 10000.0,
        max_position_embeddings: int = 2048,
        use_parallel_residual: bool = False,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 0,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_qkv_tokens = num_qkv_tokens
        self.num_proj_tokens = num_proj_tokens
        self.num_ffn_tokens = num_ffn_tokens
        self.qkv_scale_base = num_qkv_tokens if qkv_scale_base is None else qkv_scale_base
        self.proj_scale_base = num_proj_tokens if proj_scale_base is None else proj_scale_base
        self.ffn_scale_base = num_ffn_tokens if ffn_scale_base is None else ffn_scale_base
        self.theta = theta
        self.norm = norm
        self.final_norm = final_norm
        self.layer_norm_eps = layer_norm_eps
        self.rms_norm_eps = rms_norm_eps
        self.rotary_pct = rotary_pct
        self.rotary_emb_base = rotary_emb_base
        self.max_position_embeddings = max_position_embeddings
        self.use_parallel_residual = use_parallel_residual
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        if hidden_size % num_attention_heads:
            raise ValueError(f"{hidden_size=} is not a multiple of {num_attention_heads=}")
        if int(hidden_size // num_attention_heads * rotary_pct) % 2:
            raise ValueError(f"{rotary_pct=} of a head is an odd number of features; pairs are rotated")
        if theta not in THETAS:
            raise ValueError(f"unknown {theta=}; known: {', '.join(THETAS)}")
        for name in (norm, final_norm):
            if name not in NORMS:
                raise ValueError(f"unknown norm {name!r}; known: {', '.join(NORMS)}")


def softmax(scores: Tensor, scale_base: int) -> Tensor:
    """Computes scale_base * exp(a) / sum(exp(a)) over the last dimension."""
    return scale_base * scores.softmax(-1)


def gelu_l2_norm(scores: Tensor, scale_base: int) -> Tensor:
    """Computes sqrt(scale_base) * gelu(a) / ||gelu(a)||_2 over the last dimension."""
    return scaled_to_norm(F.gelu(scores), math.sqrt(scale_base))


def l2_norm_gelu(scores: Tensor, scale_base: int) -> Tensor:
    """Computes gelu(sqrt(scale_base) * a / ||a||_2) over the last dimension."""
    return F.gelu(scaled_to_norm(scores, math.sqrt(scale_base)))


def scaled_to_norm(rows: Tensor, norm: float) -> Tensor:
    """Scales rows to the length `norm`.

    A row whose squares vanish becomes zero, where the published code divides by zero.
    """
    sum_of_squares = rows.square().sum(-1, keepdim=True)
    vanishing = sum_of_squares < torch.finfo(rows.dtype).tiny
    factor = norm / sum_of_squares.masked_fill(vanishing, 1.0).sqrt()
    return rows * factor.masked_fill(vanishing, 0.0)


THETAS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": softmax,
    "gelu_l2_norm": gelu_l2_norm,
    "l2_norm_gelu": l2_norm_gelu,
}


class TokenFormerLayerNorm(nn.LayerNorm):
    """Layer normalization with weight and bias."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)


class TokenFormerNonParametricLayerNorm(nn.LayerNorm):
    """Layer normalization without weight and bias."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps, elementwise_affine=False)


class TokenFormerRMSNorm(nn.RMSNorm):
    """Root-mean-square normalization with weight."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config.hidden_size, eps=config.rms_norm_eps)


NORMS: dict[str, type[nn.Module]] = {
    "layernorm": TokenFormerLayerNorm,
    "layernorm_nonparam": TokenFormerNonParametricLayerNorm,
    "rmsnorm": TokenFormerRMSNorm,
}


class TokenFormerPattention(nn.Module):
    """Y = theta(X K^T) V over P parameter tokens: keys [P, D], values [P, D]. No bias, no 1/sqrt(D).

    Scores are computed in the format of the model, their normalization in float32.
    """

    def __init__(self, config: TokenFormerConfig, num_tokens: int, scale_base: int) -> None:
        super().__init__()
        self.theta = config.theta
        self.scale_base = scale_base
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, config.hidden_size))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores = F.linear(hidden_states, self.key_tokens)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = THETAS[self.theta](wide, self.scale_base).to(hidden_states.dtype)
        return weights @ self.value_tokens

    def extra_repr(self) -> str:
        num_tokens, hidden_size = self.key_tokens.shape
        return f"{hidden_size}, num_tokens={num_tokens}, theta={self.theta!r}, scale_base={self.scale_base}"


def rotary_tables(config: TokenFormerConfig, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """Computes cosines and sines, each [B or 1, 1, S, r] in float32; r = int(E * rotary_pct) features are rotated."""
    rotated = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    if rotated == 0:
        return None
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_ids.device) / rotated
    frequencies = 1.0 / config.rotary_emb_base**exponents
    angles = (position_ids[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, i + r/2) of the first r features of x [B, H, S, E]; in float32, to the format of x."""
    rotated, kept = x.tensor_split([cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), kept), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Computes attention step by step: output [B, S, H, E] and probabilities [B, H, S, T].

    The mask is added to the scores.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    probabilities = F.dropout(probabilities, dropout, module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class TokenFormerAttention(nn.Module):
    """Causal self-attention whose query, key, value and output projections are Pattentions."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query, self.key, self.value = (
            TokenFormerPattention(config, config.num_qkv_tokens, config.qkv_scale_base) for _ in range(3)
        )
        self.proj = TokenFormerPattention(config, config.num_proj_tokens, config.proj_scale_base)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.proj(output.reshape(batch, length, -1)), probabilities


class TokenFormerLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Pre-norm attention and feed-forward Pattention around the residual stream."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = NORMS[config.norm](config)
        self.attention = TokenFormerAttention(config, layer_idx)
        self.post_attention_layernorm = NORMS[config.norm](config)
        self.mlp = TokenFormerPattention(config, config.num_ffn_tokens, config.ffn_scale_base)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        output, probabilities = self.attention(
            self.input_layernorm(hidden_states), rotary, attention_mask, past_key_values, **kwargs
        )
        attended = hidden_states + self.dropout(output)
        mlp_input = hidden_states if self.use_parallel_residual else attended
        return attended + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input))), probabilities


class TokenFormerPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Declarations of a TokenFormer that transformers reads, and its initialization."""

    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TokenFormerLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Draws the published initialization.

        Keys and embeddings are N(0, 0.02), values N(0, 2 / (L sqrt(D))) over L layers, norms 1 and 0.
        """
        super()._init_weights(module)
        if isinstance(module, TokenFormerPattention):
            nn.init.normal_(module.key_tokens, std=self.config.initializer_range)
            nn.init.normal_(
                module.value_tokens, std=2 / (self.config.num_hidden_layers * math.sqrt(self.config.hidden_size))
            )


class TokenFormerModel(TokenFormerPreTrainedModel):
    """Embeddings, layers and final norm: token ids to the normalized residual stream."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(TokenFormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = NORMS[config.final_norm](config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the residual stream [B, S, D] of input_ids [B, S] or inputs_embeds [B, S, D].

        attention_mask [B, T] is 0 where a token is padding. Positions count from the number of cached tokens unless
        given. Attention probabilities come from the eager implementation only. hidden_states are the embeddings, each
        layer's output, and last the normalized output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs the model loaded with attn_implementation='eager'")
        if use_cache is None:
            use_cache = self.config.use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + seen
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = rotary_tables(self.config, position_ids)
        hidden_states = self.dropout(inputs_embeds)
        all_hidden_states, all_attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, probabilities = layer(
                hidden_states, rotary, mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
            all_hidden_states.append(hidden_states)
            all_attentions.append(probabilities)
        hidden_states = self.norm(hidden_states)
        all_hidden_states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A TokenFormer with its language-model head, which is tied to the embeddings unless configured otherwise."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Computes logits [B, S, V], and the loss where labels are given; other arguments are TokenFormerModel's.

        labels [B, S] are shifted here, -100 is left out, and the loss is the mean cross entropy. logits_to_keep limits
        the logits to that many last positions, or to the positions of a tensor.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# So that save_pretrained copies this file and names it in the configuration's auto_map.
TokenFormerConfig.register_for_auto_class()
TokenFormerModel.register_for_auto_class("AutoModel")
TokenFormerForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
