"""Keys that decide what the network is. NeoX's layers, norms and fused kernels: megatron/model in gpt-neox."""

from __future__ import annotations

from megatron.config.architecture import attention_types
from megatron.config.json_schema import BOOL, DICTIONARY, LIST, NUMBER, TEXT, WHOLE, one_of
from megatron.config.neox.keys.entries import (
    DELETED_EXPERIMENT,
    Converted,
    Entry,
    Flat,
    Inert,
    MapsTo,
    RefusedError,
    Rejected,
    absent_flag,
    only,
)
from megatron.config.yaml.problems import YamlValue

_SAME_FUNCTION = "a fused kernel of the same function; PyTorch picks its own"


def architecture_of(value: YamlValue, flat: Flat) -> Converted:
    """The architecture that an `attention_config` such as [[["tokenformer"], 12]] describes."""
    layers = _attention_layers(value, flat.get("num_layers"))
    known = attention_types()
    for kind in layers:
        if kind not in known:
            raise RefusedError(f"attention type {kind} is not implemented; use one of {', '.join(known)}")
    architectures = {known[kind] for kind in layers}
    if len(architectures) > 1:
        raise RefusedError("all layers must be of one architecture")
    num_layers = flat.get("num_layers")
    if isinstance(num_layers, int) and len(layers) != num_layers:
        raise RefusedError(f"describes {len(layers)} layers, but num_layers is {num_layers}")
    return architectures.pop()


def _attention_layers(value: YamlValue, num_layers: YamlValue) -> list[str]:
    """One attention type per layer: the list itself when flat, else groups of types times a count or "all"."""
    malformed = RefusedError('expected [[["tokenformer"], N]] or [[["flash"], N]] for N layers')
    if not isinstance(value, list) or not value:
        raise malformed
    layers: list[str] = []
    for item in value:
        if isinstance(item, str):
            layers.append(item)
            continue
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
            raise malformed
        kinds, count = [str(kind) for kind in item[0]], item[1]
        if count == "all" and isinstance(num_layers, int):
            count = num_layers // len(kinds)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise malformed
        layers.extend(kinds * count)
    return layers


def _norm(value: YamlValue, flat: Flat) -> Converted:
    if value == "non_parametric_layernorm":
        return "layernorm_nonparam"
    if value in ("te_layernorm", "te_rmsnorm"):
        raise RefusedError(f"Transformer Engine is not supported; use {str(value).removeprefix('te_')}")
    if value == "scalenorm":
        raise RefusedError("scalenorm is not implemented; use layernorm, layernorm_nonparam or rmsnorm")
    return value


def _activation(value: YamlValue, flat: Flat) -> Converted:
    """NeoX's bias_gelu_fusion replaces exact GeLU by its tanh approximation, whatever `activation` says of gelu."""
    activation = flat.get("activation") or "gelu"
    if activation == "gelu" and flat.get("bias_gelu_fusion") is True:
        return "gelu_tanh"
    return activation


def _position_embedding(value: YamlValue, flat: Flat) -> Converted:
    if value in ("learned", "sinusoidal", "rpe", "alibi"):
        raise RefusedError(f"{value} positions are not implemented; use rotary or none")
    return value


def _negated(value: YamlValue, flat: Flat) -> Converted:
    return not value


def _init_method(value: YamlValue, flat: Flat) -> Converted:
    if value == "single_residual_scaled_normal":
        raise RefusedError("single_residual_scaled_normal is not implemented; use scaled_normal")
    return value


def _is_four_times_hidden(value: YamlValue, flat: Flat) -> str | None:
    hidden = flat.get("hidden_size")
    if isinstance(hidden, int) and value == 4 * hidden:
        return None
    wanted = f" ({4 * hidden})" if isinstance(hidden, int) else ""
    return f"the MLP is always 4 x hidden_size{wanted} wide; leave the key out"


def _divides_mlp_width(value: YamlValue, flat: Flat) -> str | None:
    hidden = flat.get("hidden_size")
    if isinstance(hidden, int) and isinstance(value, int) and value > 0 and 4 * hidden % value == 0:
        return None
    return "the MLP is always 4 x hidden_size wide, which this does not divide; leave the key out"


def _same_as(other: str, because: str) -> Inert:
    def check(value: YamlValue, flat: Flat) -> str | None:
        if value == flat.get(other):
            return None
        return f"known to NeoX, not supported here: {because}; leave it out or give it the value of {other}"

    return Inert(WHOLE, f"equal to {other}, the only value accepted, it asks for nothing", check)


_UNREAD = "only read by {}, which attention_config refuses"

MODEL_KEYS: dict[str, Entry] = {
    "architecture": MapsTo(
        "model.architecture",
        difference="not a NeoX key; there, attention_config decides",
        meaning="Layer design; attention_config, when given, says it as well.",
        default="gpt_neox",
    ),
    "attention_config": MapsTo(
        "model.architecture",
        architecture_of,
        LIST,
        "one architecture for all layers; global and flash are the same function",
        meaning='Attention types and how many layers they are for, as in [[["tokenformer"], 12]] or [[["flash"], 12]]; '
        "sets the architecture.",
    ),
    "num_layers": MapsTo("model.num_layers"),
    "hidden_size": MapsTo("model.hidden_size"),
    "num_attention_heads": MapsTo("model.num_attention_heads"),
    "seq_length": MapsTo("model.seq_length"),
    "max_position_embeddings": MapsTo("model.max_position_embeddings"),
    "qkv_slot_num": MapsTo("model.param_tokens.qkv", difference="TokenFormer release; not a key of NeoX proper"),
    "proj_slot_num": MapsTo("model.param_tokens.proj", difference="TokenFormer release"),
    "ffn_slot_num": MapsTo("model.param_tokens.ffn", difference="TokenFormer release"),
    "norm_activation_type": MapsTo("model.param_tokens.theta", difference="TokenFormer release"),
    "qkv_scale_base": MapsTo(
        "model.param_tokens.qkv_scale_base", difference="not a NeoX key; the release recomputes it"
    ),
    "proj_scale_base": MapsTo("model.param_tokens.proj_scale_base", difference="not a NeoX key"),
    "ffn_scale_base": MapsTo("model.param_tokens.ffn_scale_base", difference="not a NeoX key"),
    "norm": MapsTo(
        "model.norm",
        _norm,
        one_of("layernorm", "layernorm_nonparam", "rmsnorm", "non_parametric_layernorm"),
        "NeoX's non_parametric_layernorm is layernorm_nonparam, as in the TokenFormer release",
    ),
    "final_norm": MapsTo("model.final_norm", _norm, difference="TokenFormer release"),
    "layernorm_epsilon": MapsTo("model.layernorm_epsilon"),
    "rms_norm_epsilon": MapsTo("model.rms_norm_epsilon"),
    "scalenorm_epsilon": Inert(NUMBER, "only read by scalenorm, which norm refuses"),
    "use_bias_in_norms": Rejected("LayerNorm always has a bias", "leave it out, or use norm: rmsnorm", (True,), BOOL),
    "activation": MapsTo(
        "model.activation",
        _activation,
        difference="gelu_tanh is NeoX's gelu with bias_gelu_fusion: true; other activations are not implemented",
    ),
    "bias_gelu_fusion": MapsTo(
        "model.activation",
        _activation,
        BOOL,
        meaning="Compute the MLP's GeLU by its tanh approximation (gpt_neox), as NeoX's fused kernel does.",
        default=False,
    ),
    "pos_emb": MapsTo(
        "model.pos_emb",
        _position_embedding,
        difference="must be given: NeoX's default, learned positions, is not implemented",
    ),
    "rotary_pct": MapsTo("model.rotary_pct"),
    "rotary_emb_base": MapsTo("model.rotary_emb_base"),
    "rotary_save_freqs_buffer": Inert(BOOL, "rotary frequencies are recomputed, never stored in a checkpoint"),
    "rpe_num_buckets": Inert(WHOLE, "only read with pos_emb: rpe, which is refused"),
    "rpe_max_distance": Inert(WHOLE, "only read with pos_emb: rpe, which is refused"),
    "opt_pos_emb_offset": Inert(WHOLE, "only read with pos_emb: learned, which is refused"),
    "gpt_j_residual": MapsTo("model.parallel_residual"),
    "gpt_j_tied": absent_flag("the two norms of a parallel residual are separate", "use gpt_j_tied: false"),
    "no_weight_tying": MapsTo(
        "model.tie_embeddings",
        _negated,
        BOOL,
        meaning="The head has a matrix of its own instead of the embedding's.",
        default=False,
    ),
    "use_bias_in_attn_linear": MapsTo("model.use_bias_in_attn_linear", difference="false by default for tokenformer"),
    "use_bias_in_mlp": MapsTo("model.use_bias_in_mlp", difference="false by default for tokenformer"),
    "attention_dropout": MapsTo("model.attention_dropout"),
    "hidden_dropout": MapsTo("model.hidden_dropout"),
    "init_method": MapsTo("model.init_method", _init_method),
    "output_layer_init_method": MapsTo("model.output_layer_init_method", _init_method),
    "init_method_std": MapsTo("model.init_method_std"),
    "make_vocab_size_divisible_by": MapsTo(
        "model.make_vocab_size_divisible_by",
        difference="NeoX pads to this times model_parallel_size, so that its loss depends on the layout",
    ),
    "padded_vocab_size": MapsTo("model.padded_vocab_size", difference="NeoX overwrites it with the tokenizer's"),
    "mask_padded_vocab": MapsTo("model.mask_padded_vocab", difference="not a NeoX key; there, padding is not masked"),
    "output_layer_parallelism": Inert(
        TEXT, "the head is always split by vocabulary", only("column", because="the head is split by vocabulary")
    ),
    "num_kv_heads": _same_as("num_attention_heads", "grouped-query attention is not implemented"),
    "num_unique_layers": _same_as("num_layers", "layers do not share parameters"),
    "param_sharing_style": Inert(TEXT, "only read with num_unique_layers below num_layers, which is refused"),
    "intermediate_size": Inert(WHOLE, "equal to 4 x hidden_size, the only value accepted", _is_four_times_hidden),
    "ffn_dim": Inert(WHOLE, "equal to 4 x hidden_size, the only value accepted", _is_four_times_hidden),
    "expansion_factor": Inert(
        NUMBER, "4 is the only value accepted", only(4, 4.0, because="the MLP is 4 x hidden_size wide")
    ),
    "mlp_multiple_of": Inert(WHOLE, "the MLP width is a multiple of it already", _divides_mlp_width),
    "sliding_window_width": Rejected("sliding-window attention is not implemented"),
    "use_qk_layernorm": absent_flag("norms on queries and keys are not implemented"),
    "soft_prompt_tuning": Rejected("soft prompts are not implemented"),
    "sparsity_config": Inert(DICTIONARY, _UNREAD.format("sparse attention")),
    "gmlp_attn_dim": Inert(WHOLE, _UNREAD.format("gMLP layers")),
    "head_size": Inert(WHOLE, _UNREAD.format("RWKV layers")),
    "dim_att": Inert(WHOLE, _UNREAD.format("RWKV layers")),
    "mamba_causal_conv_fusion": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "mamba_inner_func_fusion": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "mamba_selective_fp32_params": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "mamba_selective_scan_fusion": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "mamba_use_bias_in_conv": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "mamba_use_bias_in_linears": Inert(BOOL, _UNREAD.format("Mamba layers")),
    "scaled_upper_triang_masked_softmax_fusion": Inert(BOOL, _SAME_FUNCTION),
    "scaled_masked_softmax_fusion": Inert(BOOL, _SAME_FUNCTION),
    "bias_dropout_fusion": Inert(BOOL, _SAME_FUNCTION),
    "layernorm_fusion": Inert(BOOL, _SAME_FUNCTION),
    "rmsnorm_fusion": Inert(BOOL, _SAME_FUNCTION),
    "rope_fusion": Inert(BOOL, _SAME_FUNCTION),
    "fused_kernels_build_path": Inert(TEXT, "no kernel is compiled ahead of a run"),
    "use_flashattn_swiglu": absent_flag("SwiGLU is not implemented"),
    "apply_query_key_layer_scaling": Inert(
        BOOL, "NeoX divides the scores by the layer number and multiplies them back before the softmax: same function"
    ),
    "attention_softmax_in_fp32": Inert(BOOL, "the attention softmax accumulates in fp32 in every backend"),
    "fp16_lm_cross_entropy": absent_flag("the loss is always computed in fp32"),
    "use_cpu_initialization": Inert(
        BOOL, "initial weights depend on the seed and the parameter's name, not on the device"
    ),
    "te_columnparallel": absent_flag("Transformer Engine is not supported"),
    "te_rowparallel": absent_flag("Transformer Engine is not supported"),
    "te_layernorm_mlp": absent_flag("Transformer Engine is not supported"),
    "te_mha": absent_flag("Transformer Engine is not supported"),
    "te_fp8_mha": absent_flag("Transformer Engine is not supported"),
    "te_fp8_format": Inert(TEXT, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_wgrad": Inert(BOOL, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_amax_compute_algo": Inert(TEXT, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_amax_history_len": Inert(WHOLE, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_margin": Inert(WHOLE, "only read by Transformer Engine layers, which are refused"),
    "moe_num_experts": Rejected("mixture of experts is not implemented", harmless=(1,), accepts=WHOLE),
    "num_experts": Rejected("mixture of experts is not implemented", harmless=(1,), accepts=WHOLE),
    "mlp_type": Inert(TEXT, "regular is the only value accepted", only("regular", because="one MLP is implemented")),
    "tokenformer_use": absent_flag(
        "the TokenFormer release itself selects its layers by attention_config",
        'use attention_config: [[["tokenformer"], N]]',
    ),
    "word_embed_fuse": absent_flag(DELETED_EXPERIMENT),
    "transformer_increase_dim": Rejected(DELETED_EXPERIMENT, harmless=(0,), accepts=WHOLE),
}

MODEL_KEYS |= {
    f"moe_{name}": Inert(kind, "only read with more than one expert, which is refused")
    for name, kind in {
        "expert_interval": WHOLE,
        "jitter_eps": NUMBER,
        "lbl_in_fp32": BOOL,
        "router_type": TEXT,
        "top_k": WHOLE,
        "eval_capacity_factor": NUMBER,
        "expert_parallel_size": WHOLE,
        "loss_coeff": NUMBER,
        "min_capacity": WHOLE,
        "token_dropping": BOOL,
        "train_capacity_factor": NUMBER,
        "use_residual": BOOL,
    }.items()
} | {
    "create_moe_param_group": Inert(BOOL, "only read with more than one expert, which is refused"),
    "expert_interval": Inert(WHOLE, "only read with more than one expert, which is refused"),
    "use_tutel": Inert(BOOL, "only read with more than one expert, which is refused"),
}
