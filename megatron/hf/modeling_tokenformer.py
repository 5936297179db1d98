"""TokenFormer for transformers, in one file that imports torch and transformers alone and ships with every export.

TokenFormer (Wang et al. 2024, arXiv:2410.23168) replaces every projection of a decoder, and its MLP, by Pattention:
attention from the tokens of the sequence to learnable parameter tokens. Needs transformers 5.

Shape letters: B batch, S sequence, T cached and new positions, D hidden size, H heads, E features of a head, r rotated
ones, P parameter tokens, V vocabulary. Under tensor parallelism, H and P are those of the rank in the layers that the
plan splits.
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
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class TokenFormerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and arithmetic of a TokenFormer; the defaults are those of the published 150M model.

    num_qkv_tokens, num_proj_tokens, num_ffn_tokens: parameter tokens of each query, key and value Pattention, of the
        attention output Pattention, and of the one that stands for the MLP.
    qkv_scale_base, proj_scale_base, ffn_scale_base: token counts that set the scale of the normalized scores. They
        are the current counts unless given; a model that was grown keeps those it had before.
    param_token_share: part of the tokens of every Pattention that is read, for models that were trained elastic: the
        first part of each of param_token_groups equal groups, under the scale of all. The weights stay whole.
    theta: normalization of the scores: "softmax", "gelu_l2_norm" or "l2_norm_gelu".
    norm, final_norm: "layernorm", "layernorm_nonparam" (no weights) or "rmsnorm".
    rope_parameters: rope_type, rope_theta and partial_rotary_factor, the share of each head's features that is rotated
        (0 for a model without position embeddings). Earlier exports call the last two rotary_emb_base and rotary_pct.
    initializer_range: standard deviation of new embeddings and key tokens; new value tokens have 2 / (L sqrt(D)).
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # q, k and v split their tokens and scatter the sum over them to the heads of each rank; proj takes those features
    # and splits its own tokens by feature; the MLP splits its tokens. DTensor sums the norms of the scores.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.attention.query": "colwise",
        "layers.*.attention.key": "colwise",
        "layers.*.attention.value": "colwise",
        "layers.*.attention.proj": "rowwise",
        "layers.*.mlp": "colwise_gather_output",
    }

    vocab_size: int = 50304
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_qkv_tokens: int = 768
    num_proj_tokens: int = 768
    num_ffn_tokens: int = 3072
    qkv_scale_base: int | None = None
    proj_scale_base: int | None = None
    ffn_scale_base: int | None = None
    param_token_groups: int = 1
    param_token_share: float = 1.0
    theta: str = "l2_norm_gelu"
    norm: str = "layernorm_nonparam"
    final_norm: str = "layernorm"
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-8
    rope_parameters: RopeParameters | Any = None
    max_position_embeddings: int = 2048
    use_parallel_residual: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("qkv", "proj", "ffn"):
            if getattr(self, f"{name}_scale_base") is None:
                setattr(self, f"{name}_scale_base", getattr(self, f"num_{name}_tokens"))
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} attention heads"
            )
        share = self.rope_parameters["partial_rotary_factor"]
        if int(self.hidden_size // self.num_attention_heads * share) % 2:
            raise ValueError(f"partial_rotary_factor {share} of a head is an odd number of features; pairs are rotated")
        if self.theta not in THETAS:
            raise ValueError(f"unknown theta {self.theta!r}; known: {', '.join(THETAS)}")
        for part in ("qkv", "proj", "ffn"):
            self.tokens_read_of_each_group(part)
        for name in (self.norm, self.final_norm):
            if name not in NORMS:
                raise ValueError(f"unknown norm {name!r}; known: {', '.join(NORMS)}")

    def tokens_read_of_each_group(self, part: str) -> int:
        """Returns how many tokens of each group of a Pattention are read; `part` is "qkv", "proj" or "ffn"."""
        count: int = getattr(self, f"num_{part}_tokens")
        groups, share = self.param_token_groups, self.param_token_share
        if not 0.0 < share <= 1.0:
            raise ValueError(f"param_token_share {share} is not above 0 and up to 1")
        if groups < 1 or count % groups:
            raise ValueError(f"num_{part}_tokens {count} is not a multiple of param_token_groups {groups}")
        block = count // groups
        taken: int = round(share * block)
        if not taken or abs(taken - share * block) > 1e-6 * block:
            raise ValueError(
                f"param_token_share {share} is no whole number of the {block} tokens of a group of num_{part}_tokens; "
                f"nearest: {max(taken, 1) / block:.7g}"
            )
        return taken

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        rope = dict(kwargs.pop("rope_scaling", None) or self.rope_parameters or {})
        rope.setdefault("rope_theta", kwargs.pop("rotary_emb_base", self.default_theta))
        rope.setdefault("partial_rotary_factor", kwargs.pop("rotary_pct", 0.25))
        self.rope_parameters = rope
        self.standardize_rope_params()
        return kwargs


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

    `part` names the counts of the configuration: "qkv", "proj" or "ffn". Scores are computed in the format of the
    model, their normalization in float32.
    """

    def __init__(self, config: TokenFormerConfig, part: str) -> None:
        super().__init__()
        # The styles of a tensor-parallel plan read these of any layer that maps features to features.
        self.in_features = self.out_features = config.hidden_size
        self.theta = config.theta
        self.scale_base: int = getattr(config, f"{part}_scale_base")
        num_tokens = getattr(config, f"num_{part}_tokens")
        self.groups, self.tokens_of_each = config.param_token_groups, config.tokens_read_of_each_group(part)
        self.reads_all = self.groups * self.tokens_of_each == num_tokens
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, config.hidden_size))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        scores = F.linear(hidden_states, self.read(self.key_tokens))
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = THETAS[self.theta](wide, self.scale_base).to(hidden_states.dtype)
        return weights @ self.read(self.value_tokens)

    def read(self, tokens: Tensor) -> Tensor:
        """Returns the rows of the tokens that are read."""
        if self.reads_all:
            return tokens
        if hasattr(tokens, "device_mesh"):
            raise ValueError("param_token_share is below 1, which does not split over ranks: extract the smaller model")
        return tokens.view(self.groups, -1, tokens.shape[1])[:, : self.tokens_of_each].flatten(0, 1)

    def extra_repr(self) -> str:
        num_tokens, hidden_size = self.key_tokens.shape
        return f"{hidden_size}, num_tokens={num_tokens}, theta={self.theta!r}, scale_base={self.scale_base}"


class TokenFormerRotaryEmbedding(nn.Module):
    """Cosines and sines of positions; r = int(E * partial_rotary_factor) features of a head are rotated."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        compute: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        frequencies, self.attention_scaling = compute(config)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)
        self.original_inv_freq = nn.Buffer(frequencies.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: TokenFormerConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[Tensor, float]:
        """Computes the frequencies [r / 2] of Su et al. 2021 (arXiv:2104.09864), and the factor 1 of their tables."""
        rope = config.rope_parameters
        rotated = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        return (1.0 / rope["rope_theta"] ** exponents).to(device), 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TokenFormerRotaryEmbedding":
        """Keeps the frequencies in float32 where the model is cast to another format."""
        before = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not before[0].is_meta:
            self.inv_freq, self.original_inv_freq = (
                nn.Buffer(frequencies.to(self.inv_freq.device), persistent=False) for frequencies in before
            )
        return self

    @torch.no_grad()
    @dynamic_rope_update  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Computes cosines and sines, each [B or 1, S, r] in float32, on the device of x."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate_half(x: Tensor) -> Tensor:
    """Turns pairs (i, i + r/2) of the last dimension by a right angle."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r features of x [B, H, S, E]; in float32, to the format of x."""
    rotated, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = rotated * cos[:, None] + rotate_half(rotated) * sin[:, None]
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
        self.query, self.key, self.value = (TokenFormerPattention(config, "qkv") for _ in range(3))
        self.proj = TokenFormerPattention(config, "proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        batch, length = hidden_states.shape[:2]
        query, key, value = (
            projection(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        query = apply_rotary_pos_emb(query, *position_embeddings)
        key = apply_rotary_pos_emb(key, *position_embeddings)
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
        self.mlp = TokenFormerPattention(config, "ffn")
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        output, _ = self.attention(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        attended = hidden_states + self.dropout(output)
        mlp_input = hidden_states if self.use_parallel_residual else attended
        result: Tensor = attended + self.dropout(self.mlp(self.post_attention_layernorm(mlp_input)))
        return result


class TokenFormerPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Declarations of a TokenFormer that transformers reads, and its initialization."""

    config: TokenFormerConfig
    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TokenFormerLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": TokenFormerLayer,
        "attentions": TokenFormerAttention,
    }

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
        self.rotary_emb = TokenFormerRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Computes the residual stream [B, S, D] of input_ids [B, S] or inputs_embeds [B, S, D].

        attention_mask [B, T] is 0 where a token is padding. Positions count from the number of cached tokens unless
        given. With output_hidden_states, hidden_states are the embeddings, each layer's output, and last the normalized
        output; with output_attentions, attentions are the probabilities, which the eager implementation alone computes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
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
        hidden_states = self.dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings,
                mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A TokenFormer with its language-model head, which is tied to the embeddings unless configured otherwise."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
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
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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


class TokenFormerForSequenceClassification(GenericForSequenceClassification, TokenFormerPreTrainedModel):  # type: ignore[misc]
    """A TokenFormer that classifies a sequence by its last token; config.pad_token_id tells which that is."""

    def __init__(self, config: TokenFormerConfig) -> None:
        TokenFormerPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.model = TokenFormerModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


# So that save_pretrained copies this file and names it in the configuration's auto_map.
TokenFormerConfig.register_for_auto_class()
TokenFormerModel.register_for_auto_class("AutoModel")
TokenFormerForCausalLM.register_for_auto_class("AutoModelForCausalLM")
TokenFormerForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerForSequenceClassification", "TokenFormerModel"]
