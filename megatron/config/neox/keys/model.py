"""Keys that decide what the network is. NeoX's layers, norms and fused kernels: megatron/model in gpt-neox."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from megatron.config.architecture import attention_types, implied_architecture
from megatron.config.architectures.llama import default_width
from megatron.config.neox_entries import (
    DELETED_EXPERIMENT,
    UNSET,
    Conversion,
    Converted,
    Flat,
    Inert,
    MapsTo,
    RefusedError,
    Rejected,
    TableEntry,
    absent_flag,
    only,
)
from megatron.config.yaml.problems import YamlValue

_ONE_EXPERT = "only read with more than one expert, which is refused"
_SAME_FUNCTION = "a fused kernel of the same function; PyTorch picks its own"


def architecture_of(value: YamlValue, flat: Flat) -> Converted:
    """Returns the architecture that an `attention_config` such as [[["tokenformer"], 12]] describes.

    Where several have its attention types, the one that is named, or else implied by the other keys.
    """
    layers = _attention_layers(value, flat.get("num_layers"))
    known = attention_types()
    for kind in layers:
        if kind not in known:
            raise RefusedError(f"attention type {kind} is not implemented; {', '.join(known)} are")
    possible = [name for name in next(iter(known[kind] for kind in layers)) if all(name in known[k] for k in layers)]
    if not possible:
        raise RefusedError("layers of several architectures in one model are not implemented")
    num_layers = flat.get("num_layers")
    if isinstance(num_layers, int) and layers.total() != num_layers:
        raise RefusedError(f"describes {layers.total()} layers, but num_layers is {num_layers}")
    chosen = next((name for name in (flat.get("architecture"), implied_architecture(flat)) if name in possible), None)
    return chosen or possible[0]


def _attention_layers(value: YamlValue, num_layers: YamlValue) -> Counter[str]:
    """Counts the layers of each attention type: the value is their list, or groups of types times a count or "all"."""
    malformed = RefusedError('expected [[["tokenformer"], N]] or [[["flash"], N]] for N layers')
    if not isinstance(value, list) or not value:
        raise malformed
    layers: Counter[str] = Counter()
    for item in value:
        if isinstance(item, str):
            layers[item] += 1
            continue
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and item[0]):
            raise malformed
        kinds, count = [str(kind) for kind in item[0]], item[1]
        if count == "all" and isinstance(num_layers, int):
            count = num_layers // len(kinds)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise malformed
        for kind in kinds:
            layers[kind] += count
    return layers


def _norm(value: YamlValue, flat: Flat) -> Converted:
    if value == "non_parametric_layernorm":
        return "layernorm_nonparam"
    if value in ("te_layernorm", "te_rmsnorm"):
        same = str(value).removeprefix("te_")
        raise RefusedError(f"Transformer Engine is not supported; use norm: {same}, the same function")
    if value == "scalenorm":
        raise RefusedError("scalenorm is not implemented; layernorm, layernorm_nonparam and rmsnorm are")
    return value


_GATE = ("silu", "swish")
"""NeoX's names of the function on the gate of its `mlp_type: llama`."""


def _activation(value: YamlValue, flat: Flat) -> Converted:
    """Leaves exact GeLU to bias_gelu_fusion, under which NeoX computes the tanh approximation.

    The gate of NeoX's older `mlp_type: llama` makes swiglu of silu.
    """
    if flat.get("mlp_type") == "llama" and value in _GATE:
        return "swiglu"
    _refuse_absent(value, "geglu relu softsign swish mish silu reglu bilinear glu", "gelu, gelu_tanh and swiglu")
    fused = flat.get("bias_gelu_fusion") is True and not _is_llama(flat)
    return UNSET if value == "gelu" and fused else value


def _mlp_type(value: YamlValue, flat: Flat) -> Converted:
    """Chooses the architecture of NeoX's older gated MLP; regular asks for nothing."""
    if value == "regular":
        return UNSET
    if value != "llama":
        raise RefusedError("known to NeoX, not supported here with this value; only regular and llama are accepted")
    if flat.get("activation") not in (*_GATE, "swiglu"):
        raise RefusedError(f"a gate by {flat.get('activation', 'gelu')} is not implemented; add activation: silu")
    return flat.get("architecture", "llama")


def _fused_gelu(value: YamlValue, flat: Flat) -> Converted:
    """Returns the approximation that NeoX's fused kernel computes; of another activation it says nothing."""
    applies = flat.get("activation") in (None, "gelu") and not _is_llama(flat)
    return "gelu_tanh" if value is True and applies else UNSET


def _refuse_absent(value: YamlValue, absent: str, present: str) -> None:
    """Raises RefusedError for one of NeoX's choices that are not implemented here."""
    if value in absent.split():
        raise RefusedError(f"{value} is not implemented; {present} are")


def _position_embedding(value: YamlValue, flat: Flat) -> Converted:
    if value in ("sinusoidal", "rpe", "alibi"):
        raise RefusedError(f"{value} positions are not implemented; rotary, learned and none are")
    return value


def _negated(value: YamlValue, flat: Flat) -> Converted:
    return not value


def _init_method(value: YamlValue, flat: Flat) -> Converted:
    if value == "single_residual_scaled_normal":
        raise RefusedError("single_residual_scaled_normal is not implemented")
    return value


_OTHER_WIDTH = "known to NeoX, not supported here: only the MLP of llama has another width than 4 x hidden_size"


def _is_llama(flat: Flat) -> bool:
    return flat.get("architecture", implied_architecture(flat)) == "llama"


def _intermediate_size(value: YamlValue, flat: Flat) -> Converted:
    if not _is_llama(flat):
        hidden = flat.get("hidden_size")
        if isinstance(hidden, int) and value == 4 * hidden:
            return UNSET
        raise RefusedError(_OTHER_WIDTH + (f" ({4 * hidden})" if isinstance(hidden, int) else ""))
    if "architecture" in flat:
        raise RefusedError(
            "NeoX reads it as the width of the MLP beside mlp_type: llama, and as three times that beside activation: "
            "swiglu; give ffn_hidden_size, the width itself"
        )
    return _width(flat)


def _expansion_factor(value: YamlValue, flat: Flat) -> Converted:
    if not _is_llama(flat):
        if value == 4 and not isinstance(value, bool):
            return UNSET
        raise RefusedError(_OTHER_WIDTH)
    if "architecture" in flat or flat.get("mlp_type") == "llama":
        raise RefusedError("NeoX reads it beside activation: swiglu alone; give ffn_hidden_size, the width itself")
    if "intermediate_size" in flat:
        raise RefusedError("contradicts intermediate_size, as in NeoX; keep one")
    return _width(flat)


def _mlp_multiple_of(value: YamlValue, flat: Flat) -> Converted:
    hidden = flat.get("hidden_size")
    if not isinstance(value, int) or value < 1:
        raise RefusedError("expected a whole number above 0")
    if not _is_llama(flat):
        if isinstance(hidden, int) and 4 * hidden % value == 0:
            return UNSET
        raise RefusedError(f"{_OTHER_WIDTH}, which this does not divide")
    if "architecture" in flat or flat.get("mlp_type") == "llama":
        raise RefusedError("NeoX reads it beside activation: swiglu alone; give ffn_hidden_size, the width itself")
    return UNSET if flat.keys() & {"intermediate_size", "expansion_factor"} else _width(flat)


def _is_four_times_hidden(value: YamlValue, flat: Flat) -> str | None:
    hidden = flat.get("hidden_size")
    return None if isinstance(hidden, int) and value == 4 * hidden else _OTHER_WIDTH


def _width(flat: Flat) -> Converted:
    width = default_width(flat)
    if width is None:
        raise RefusedError("the width of the MLP follows from it and hidden_size; expected whole numbers above 0")
    return width


def _num_kv_heads(value: YamlValue, flat: Flat) -> Converted:
    """Leaves the default in place where the architecture has no other and none is asked for."""
    return UNSET if not _is_llama(flat) and value == flat.get("num_attention_heads") else value


def _grouped_heads_are_counted(value: YamlValue, flat: Flat) -> str | None:
    if value == "multihead" or (value == "groupedquery" and "num_kv_heads" in flat):
        return None
    return "known to NeoX, not supported here with this value: num_kv_heads alone counts the heads of keys and values"


def _bias_of_layernorm(value: YamlValue, flat: Flat) -> Converted:
    """Leaves a model without LayerNorm as it is: no other norm has a bias."""
    norm = flat.get("norm") or "layernorm"
    return value if "layernorm" in (norm, flat.get("final_norm") or norm) else UNSET


def _same_as(other: str, because: str) -> Inert:
    def check(value: YamlValue, flat: Flat) -> str | None:
        if value == flat.get(other):
            return None
        return f"known to NeoX, not supported here: {because}; only the value of {other} is accepted"

    return Inert(int, f"equal to {other}, the only value accepted, it asks for nothing", check)


_UNREAD = "only read by {}, which attention_config refuses"

MODEL_KEYS: dict[str, TableEntry] = {
    "attention_config": MapsTo(
        "model.architecture",
        architecture_of,
        list,
        "one architecture for all layers; global and flash are the same function",
        meaning='Attention types and how many layers they are for, as in [[["tokenformer"], 12]] or [[["flash"], 12]]; '
        "sets the architecture.",
    ),
    "norm": Conversion(
        _norm, accepts=Literal["layernorm", "layernorm_nonparam", "rmsnorm", "non_parametric_layernorm"]
    ),
    "final_norm": Conversion(_norm),
    "scalenorm_epsilon": Inert(float, "only read by scalenorm, which norm refuses"),
    "use_bias_in_norms": Conversion(_bias_of_layernorm, accepts=bool),
    "activation": Conversion(_activation),
    "bias_gelu_fusion": MapsTo(
        "model.activation",
        _fused_gelu,
        bool,
        meaning="Compute the MLP's GeLU by its tanh approximation (gpt_neox), as NeoX's fused kernel does.",
        default=False,
    ),
    "pos_emb": Conversion(_position_embedding),
    "rotary_save_freqs_buffer": Inert(bool, "rotary frequencies are recomputed, never stored in a checkpoint"),
    "rpe_num_buckets": Inert(int, "only read with pos_emb: rpe, which is refused"),
    "rpe_max_distance": Inert(int, "only read with pos_emb: rpe, which is refused"),
    "opt_pos_emb_offset": Rejected("OPT's offset of learned positions is not implemented", harmless=(0,), accepts=int),
    "gpt_j_tied": absent_flag("a parallel residual with one norm for both branches is not implemented"),
    "no_weight_tying": Conversion(
        _negated, accepts=bool, meaning="The head has a matrix of its own instead of the embedding's.", default=False
    ),
    "init_method": Conversion(_init_method),
    "output_layer_init_method": Conversion(_init_method),
    "output_layer_parallelism": Inert(
        str, "the head is always split by vocabulary", only("column", because="the head is split by vocabulary")
    ),
    "num_kv_heads": Conversion(_num_kv_heads),
    "attention_type": Inert(str, "num_kv_heads says how many heads share keys and values", _grouped_heads_are_counted),
    "num_unique_layers": _same_as("num_layers", "layers do not share parameters"),
    "param_sharing_style": Inert(str, "only read with num_unique_layers below num_layers, which is refused"),
    "intermediate_size": MapsTo(
        "model.ffn_hidden_size",
        _intermediate_size,
        int,
        "in NeoX too, the width of the MLP beside mlp_type: llama, three times it beside activation: swiglu",
        meaning="Width of the MLP (llama), by NeoX's rule; elsewhere only 4 x hidden_size is accepted.",
    ),
    "ffn_dim": Inert(int, "equal to 4 x hidden_size, the only value accepted", _is_four_times_hidden),
    "expansion_factor": MapsTo(
        "model.ffn_hidden_size",
        _expansion_factor,
        float,
        meaning="Three times the width of the MLP (llama) over hidden_size, beside activation: swiglu, as in NeoX; "
        "elsewhere only 4 is accepted.",
    ),
    "mlp_multiple_of": MapsTo(
        "model.ffn_hidden_size",
        _mlp_multiple_of,
        int,
        meaning="Round the width of the MLP (llama) up to a multiple of this, beside activation: swiglu.",
    ),
    "sliding_window_width": Rejected("sliding-window attention is not implemented"),
    "use_qk_layernorm": absent_flag("norms on queries and keys are not implemented"),
    "soft_prompt_tuning": Rejected("soft prompts are not implemented"),
    "sparsity_config": Inert(dict, _UNREAD.format("sparse attention")),
    "gmlp_attn_dim": Inert(int, _UNREAD.format("gMLP layers")),
    "head_size": Inert(int, _UNREAD.format("RWKV layers")),
    "dim_att": Inert(int, _UNREAD.format("RWKV layers")),
    "mamba_causal_conv_fusion": Inert(bool, _UNREAD.format("Mamba layers")),
    "mamba_inner_func_fusion": Inert(bool, _UNREAD.format("Mamba layers")),
    "mamba_selective_fp32_params": Inert(bool, _UNREAD.format("Mamba layers")),
    "mamba_selective_scan_fusion": Inert(bool, _UNREAD.format("Mamba layers")),
    "mamba_use_bias_in_conv": Inert(bool, _UNREAD.format("Mamba layers")),
    "mamba_use_bias_in_linears": Inert(bool, _UNREAD.format("Mamba layers")),
    "scaled_upper_triang_masked_softmax_fusion": Inert(bool, _SAME_FUNCTION),
    "scaled_masked_softmax_fusion": Inert(bool, _SAME_FUNCTION),
    "bias_dropout_fusion": Inert(bool, _SAME_FUNCTION),
    "layernorm_fusion": Inert(bool, _SAME_FUNCTION),
    "rmsnorm_fusion": Inert(bool, _SAME_FUNCTION),
    "rope_fusion": Inert(bool, _SAME_FUNCTION),
    "fused_kernels_build_path": Inert(str, "no kernel is compiled ahead of a run"),
    "use_flashattn_swiglu": Inert(bool, _SAME_FUNCTION),
    "apply_query_key_layer_scaling": Inert(
        bool, "NeoX divides the scores by the layer number and multiplies them back before the softmax: same function"
    ),
    "attention_softmax_in_fp32": Inert(bool, "the attention softmax accumulates in fp32 in every backend"),
    "fp16_lm_cross_entropy": absent_flag("the loss is always computed in fp32"),
    "use_cpu_initialization": Inert(
        bool, "initial weights depend on the seed and the parameter's name, not on the device"
    ),
    "te_columnparallel": absent_flag("Transformer Engine is not supported"),
    "te_rowparallel": absent_flag("Transformer Engine is not supported"),
    "te_layernorm_mlp": absent_flag("Transformer Engine is not supported"),
    "te_mha": absent_flag("Transformer Engine is not supported"),
    "te_fp8_mha": absent_flag("Transformer Engine is not supported"),
    "te_fp8_format": Inert(Literal["e4m3", "hybrid"], "only read by Transformer Engine layers, which are refused"),
    "te_fp8_wgrad": Inert(bool, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_amax_compute_algo": Inert(str, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_amax_history_len": Inert(int, "only read by Transformer Engine layers, which are refused"),
    "te_fp8_margin": Inert(int, "only read by Transformer Engine layers, which are refused"),
    "moe_num_experts": Rejected("mixture of experts is not implemented", harmless=(1,), accepts=int),
    "num_experts": Rejected("mixture of experts is not implemented", harmless=(1,), accepts=int),
    "mlp_type": MapsTo(
        "model.architecture",
        _mlp_type,
        str,
        meaning="llama, beside activation: silu, selects the architecture llama; regular asks for nothing.",
    ),
    "tokenformer_use": absent_flag(
        "the TokenFormer release itself selects its layers by attention_config",
        'use attention_config: [[["tokenformer"], N]]',
    ),
    "word_embed_fuse": absent_flag(DELETED_EXPERIMENT),
    "transformer_increase_dim": Rejected(DELETED_EXPERIMENT, harmless=(0,), accepts=int),
}

MODEL_KEYS |= {
    f"moe_{name}": Inert(kind, _ONE_EXPERT)
    for name, kind in {
        "expert_interval": int,
        "jitter_eps": float,
        "lbl_in_fp32": bool,
        "router_type": Literal["sinkhorn", "topk"],
        "top_k": int,
        "type": Literal["deepspeed", "megablocks"],
        "eval_capacity_factor": float,
        "expert_parallel_size": int,
        "loss_coeff": float,
        "min_capacity": int,
        "token_dropping": bool,
        "train_capacity_factor": float,
        "use_residual": bool,
    }.items()
} | {
    "create_moe_param_group": Inert(bool, _ONE_EXPERT),
    "enable_expert_tensor_parallelism": Inert(bool, _ONE_EXPERT),
    "expert_interval": Inert(int, _ONE_EXPERT),
    "use_tutel": Inert(bool, _ONE_EXPERT),
}
