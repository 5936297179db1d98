"""The model: architecture, sizes, initialization. Everything that a checkpoint's weights depend on."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from megatron.config.bounds import LayerCount, NonNegative, Positive, TokenCount, Width
from megatron.config.section import Key, OneOf, Section
from megatron.registry import variant_names

Architecture = Annotated[str, OneOf(partial(variant_names, "megatron.config.architectures"))]
Theta = Annotated[str, OneOf(partial(variant_names, "megatron.kernels.pattention.thetas"))]
Norm = Literal["layernorm", "layernorm_nonparam", "rmsnorm"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]
InitMethod = Literal[
    "normal",
    "scaled_normal",
    "small_init",
    "wang_init",
    "xavier_uniform",
    "xavier_normal",
    "orthogonal",
    "scaled_orthogonal",
]
PositionEmbedding = Literal["rotary", "learned", "none"]


class ParamTokenConfig(Section):
    """Sizes of the learnable parameter tokens (TokenFormer only), and how their scores are normalized."""

    qkv: Annotated[TokenCount, Key("qkv_slot_num", difference="TokenFormer release; not a key of NeoX proper")]
    """Parameter tokens in each of the query, key and value Pattentions [tokens, summed over tensor ranks]."""

    proj: Annotated[TokenCount, Key("proj_slot_num", difference="TokenFormer release")]
    """Parameter tokens in the Pattention that replaces the attention output projection [tokens]."""

    ffn: Annotated[TokenCount, Key("ffn_slot_num", difference="TokenFormer release")]
    """Parameter tokens in the Pattention that replaces the MLP [tokens]."""

    theta: Annotated[Theta, Key("norm_activation_type", difference="TokenFormer release")] = "l2_norm_gelu"
    """Normalization of the scores between input tokens and parameter tokens."""

    qkv_scale_base: Annotated[TokenCount, Key(difference="not a NeoX key; the release recomputes it")] = Field(
        default_factory=lambda given: given["qkv"]
    )
    """Token count that scales the q, k and v scores [tokens]; the current count unless set. Growth pins it to the count
    of the first stage, so that appended zero keys leave the model unchanged."""

    proj_scale_base: Annotated[TokenCount, Key(difference="not a NeoX key")] = Field(
        default_factory=lambda given: given["proj"]
    )
    """Token count that scales the output projection's scores [tokens]; the current count unless set."""

    ffn_scale_base: Annotated[TokenCount, Key(difference="not a NeoX key")] = Field(
        default_factory=lambda given: given["ffn"]
    )
    """Token count that scales the feed-forward scores [tokens]; the current count unless set."""

    groups: Annotated[TokenCount, Key("param_token_groups", difference="not a NeoX key")] = 1
    """Equal blocks that the tokens of every Pattention lie in. A share of the tokens is the first part of each block:
    so tensor-parallel ranks, each of which holds whole blocks, hold equal shares. A multiple of every
    model_parallel_size that elastic training is to run on; the function of the whole model does not depend on it."""

    @model_serializer(mode="wrap")
    def _without_one_group(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Models without groups are saved as they were before there were any, for older versions to read.
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name != "groups" or value != 1}


class ModelConfig(Section):
    """The network."""

    architecture: Annotated[
        Architecture, Key(difference="not a NeoX key; there, attention_config decides", default="gpt_neox")
    ]
    """Layer design; attention_config, when given, says it as well."""

    num_layers: LayerCount
    """Transformer layers [layers]."""

    hidden_size: Width
    """Width of the residual stream [features]."""

    num_attention_heads: Width
    """Attention heads; must divide hidden_size [heads]."""

    num_kv_heads: Width | None = None
    """Heads of keys and values (llama), each shared by the same number of query heads; must divide num_attention_heads
    [heads]. Unset: as many as those."""

    ffn_hidden_size: Annotated[Width | None, Key(difference="not a NeoX key; there, intermediate_size")] = None
    """Width inside the MLP (llama) [features]. Unset: 8/3 of hidden_size, rounded up to a multiple of 256, as LLaMA's;
    or by NeoX's rule, where `activation: swiglu` or `mlp_type: llama` selects the architecture."""

    seq_length: TokenCount
    """Tokens in a training sample [tokens]."""

    max_position_embeddings: TokenCount
    """Longest sequence that the model is meant for [tokens]; at least seq_length. With learned positions, as many as
    are learned: the model has no others."""

    pos_emb: Annotated[
        PositionEmbedding,
        Key(difference="must be given, unless architecture: gpt2 is; NeoX's default is learned"),
    ]
    """Position encoding: rotary, a learned vector for each of max_position_embeddings positions, or none."""

    param_tokens: ParamTokenConfig | None = None
    """Parameter tokens; required for tokenformer, absent otherwise."""

    norm: Annotated[
        Norm, Key(difference="NeoX's non_parametric_layernorm is layernorm_nonparam, as in the TokenFormer release")
    ] = "layernorm"
    """Normalization inside the layers."""

    final_norm: Annotated[Norm | None, Key(difference="TokenFormer release")] = None
    """Normalization before the head; None means the same kind as `norm`."""

    layernorm_epsilon: Positive = 1.0e-5
    """Added to the variance in LayerNorm."""

    rms_norm_epsilon: Positive = 1.0e-8
    """Added to the mean square in RMSNorm."""

    activation: Annotated[
        Activation,
        Key(
            difference="gelu_tanh is NeoX's gelu with bias_gelu_fusion: true; NeoX's swiglu selects the architecture "
            "llama, as does its mlp_type: llama with silu; other activations are not implemented"
        ),
    ] = "gelu"
    """MLP activation: exact erf GeLU, or its tanh approximation as NeoX's bias_gelu_fusion computes it and GPT-2 has it
    (gpt_neox, gpt2); or swiglu, SiLU of a gate times the other half (llama)."""

    rotary_pct: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each head's dimensions that is rotated."""

    rotary_emb_base: Positive = 10000.0
    """Base of the rotary frequencies."""

    parallel_residual: Annotated[bool, Key("gpt_j_residual")] = False
    """Attention and MLP read the same residual input (gpt_neox, llama)."""

    use_bias_in_attn_linear: bool = True
    """Biases in the attention projections (gpt_neox, gpt2, llama)."""

    use_bias_in_mlp: bool = True
    """Biases in the MLP (gpt_neox, gpt2, llama); NeoX's older mlp_type: llama has none."""

    use_bias_in_norms: bool = True
    """Biases in LayerNorm; other norms have none."""

    scale_attn_by_inverse_layer_idx: Annotated[
        bool,
        Key(
            difference="not a NeoX key; transformers calls it so. NeoX's apply_query_key_layer_scaling divides "
            "likewise, but multiplies back before the softmax"
        ),
    ] = False
    """Divide the attention scores of layer i, counted from 0, by i + 1 (gpt2)."""

    tie_embeddings: Annotated[bool, Key("no_weight_tying")] = True
    """The head shares the embedding matrix."""

    attention_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability on attention probabilities."""

    hidden_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout probability on the embeddings and on each residual branch."""

    init_method: InitMethod = "normal"
    """Initialization of input-side weights: embeddings, key tokens, qkv and first MLP matrices."""

    output_layer_init_method: InitMethod = "scaled_normal"
    """Initialization of output-side weights: value tokens, attention output and second MLP matrices."""

    init_method_std: NonNegative = 0.02
    """Standard deviation of the normal initializations."""

    make_vocab_size_divisible_by: Annotated[
        Width,
        Key(difference="NeoX pads to this times model_parallel_size, so that its loss depends on the layout"),
    ] = 128
    """The vocabulary is padded up to a multiple of this [tokens]; never of the tensor-parallel size."""

    padded_vocab_size: Annotated[TokenCount | None, Key(difference="NeoX overwrites it with the tokenizer's")] = None
    """Rows of the embedding [tokens]; None derives it from the tokenizer."""

    mask_padded_vocab: Annotated[bool, Key(difference="not a NeoX key; there, padding is not masked")] = False
    """Keep the padding rows out of the softmax; the published models let them in."""
