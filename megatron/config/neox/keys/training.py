"""Keys that decide how the model is trained: batch, optimizer, schedule, precision, recomputation, evaluation."""

from __future__ import annotations

import math
from typing import Literal

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
)
from megatron.config.optimizer import optimizer_facts, registered_optimizers
from megatron.config.yaml.problems import YamlValue

_DTYPES = {"fp16": "fp16", "bfloat16": "bf16", "fp32": "fp32"}


def _dtype(value: YamlValue, flat: Flat) -> Converted:
    if not isinstance(value, str) or value not in _DTYPES:
        meant = {"float16": "fp16", "half": "fp16", "bf16": "bfloat16", "float32": "fp32", "float": "fp32"}
        guess = f"; did you mean {meant[value]}?" if isinstance(value, str) and value in meant else ""
        raise RefusedError(f"expected one of {', '.join(_DTYPES)}{guess}")
    return _DTYPES[value]


def _fp16_switch(value: YamlValue, flat: Flat) -> Converted:
    """Selects fp16, or bf16 with NeoX's older `fp16: {enabled: true, type: bfloat16}`."""
    if value is not True:
        return UNSET
    return "bf16" if flat.get("fp16.type") == "bfloat16" else "fp16"


def _bf16_switch(value: YamlValue, flat: Flat) -> Converted:
    return "bf16" if value is True else UNSET


def _fp16_type(value: YamlValue, flat: Flat) -> Converted:
    return _dtype(value, flat) if flat.get("fp16.enabled") is True else UNSET


def _optimizer_type(value: YamlValue, flat: Flat) -> Converted:
    facts = optimizer_facts(value)
    if facts is None:
        others = "".join(f", and {'/'.join(other.names)}" for other in registered_optimizers()[1:])
        raise RefusedError(
            f"the optimizer {value} is not implemented; Adam, which is decoupled AdamW as in NeoX, is{others}"
        )
    return next(name for name in facts.names if name.lower() == str(value).lower())


def _decay_share(value: YamlValue, flat: Flat) -> Converted:
    train_iters = flat.get("train_iters")
    if flat.get("lr_decay_iters") is not None:
        raise RefusedError("lr_decay_iters is given too; keep one of them")
    if not isinstance(train_iters, int) or not isinstance(value, int | float):
        return UNSET
    if not 0 < value <= 1:
        raise RefusedError("expected a number above 0 and of at most 1")
    return max(1, math.floor(train_iters * value))


_PREFERENCES = "only read with a train_impl other than normal, which is refused"
_MUP = "only read with use_mup: true, which is refused"
_NO_INPUT_TO_CAST = "only casts inputs that are no whole numbers, and token ids are"
_NO_LOSS_SCALE = "only fp16 scales the loss; YAMLs that turn to bf16 often keep the keys of their fp16 dictionary"
_FIXED_LOSS_SCALE = "DeepSpeed's fp16 dictionary decides, as in NeoX"

TRAINING_KEYS: dict[str, TableEntry] = {
    "train_epochs": Rejected("a run is measured in steps", "use train_iters"),
    "batch_size": MapsTo(
        "training.train_micro_batch_size_per_gpu", difference="NeoX overwrites it; here it is what its name says"
    ),
    "gas": MapsTo("training.gradient_accumulation_steps", difference="NeoX's old name of gradient_accumulation_steps"),
    "clip_grad": MapsTo("training.gradient_clipping"),
    "precision": Conversion(_dtype, accepts=Literal["fp16", "bfloat16", "fp32"]),
    "fp16.enabled": MapsTo("training.precision.dtype", _fp16_switch, bool, meaning="Compute in fp16.", default=False),
    "fp16.fp16": MapsTo(
        "training.precision.dtype",
        _fp16_switch,
        bool,
        "DeepSpeed reads fp16.enabled alone",
        meaning="Another name of `fp16.enabled`.",
        default=False,
    ),
    "fp16.type": MapsTo(
        "training.precision.dtype",
        _fp16_type,
        Literal["fp16", "bfloat16"],
        "NeoX's older way to choose bf16",
        meaning="Which 16-bit format `fp16.enabled` selects.",
        default="fp16",
    ),
    "fp16.auto_cast": Inert(bool, _NO_INPUT_TO_CAST),
    "fp16.consecutive_hysteresis": absent_flag("the loss scaler keeps DeepSpeed's default"),
    "fp16.fp16_master_weights_and_grads": absent_flag("master weights are fp32"),
    "bf16.enabled": MapsTo("training.precision.dtype", _bf16_switch, bool, meaning="Compute in bf16.", default=False),
    "bf16.immediate_grad_update": absent_flag("gradients are accumulated in fp32 before the update"),
    "bf16.bf16": MapsTo(
        "training.precision.dtype",
        _bf16_switch,
        bool,
        "DeepSpeed reads bf16.enabled alone",
        meaning="Another name of `bf16.enabled`.",
        default=False,
    ),
    "bf16.auto_cast": Inert(bool, _NO_INPUT_TO_CAST),
    "bf16.loss_scale": Inert(float, _NO_LOSS_SCALE),
    "bf16.loss_scale_window": Inert(float, _NO_LOSS_SCALE),
    "bf16.initial_scale_power": Inert(int, _NO_LOSS_SCALE),
    "bf16.hysteresis": Inert(int, _NO_LOSS_SCALE),
    "bf16.min_loss_scale": Inert(float, _NO_LOSS_SCALE),
    "bf16.bf16_master_weights_and_grads": absent_flag("master weights are fp32"),
    "loss_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale", (0,), float),
    "dynamic_loss_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale: 0", (True,), bool),
    "hysteresis": Rejected(_FIXED_LOSS_SCALE, "use fp16.hysteresis", (2,), int),
    "loss_scale_window": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale_window", (1000,), float),
    "min_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.min_loss_scale", (1,), float),
    "optimizer.type": Conversion(_optimizer_type, accepts=str),
    "optimizer.params.weight_decay": Rejected("NeoX gives it to Adam a second time and stops", "use weight_decay"),
    "optimizer_type": MapsTo("training.optimizer.type", _optimizer_type, str, "NeoX overwrites it by optimizer.type"),
    "use_bnb_optimizer": absent_flag("bitsandbytes optimizers are not supported"),
    "lr": MapsTo("training.optimizer.lr", difference="NeoX overwrites it by optimizer.params.lr"),
    "lr_decay_fraction": MapsTo(
        "training.lr_schedule.decay_iters",
        _decay_share,
        float,
        meaning="Share of train_iters after which min_lr is reached; instead of lr_decay_iters.",
    ),
    "decay_lr_to": Rejected("the last learning rate is not given as a share of lr", "use min_lr"),
    "warmup_iters": Rejected("the warmup is not given in steps", "use warmup, its share of lr_decay_iters"),
    "scheduler": Rejected("DeepSpeed's schedulers are not used", "use lr_decay_style, warmup and min_lr"),
    "deepspeed_activation_checkpointing": Inert(bool, "chooses between two implementations of the same recomputation"),
    "partition_activations": Inert(
        bool, "saves memory by splitting kept activations over tensor ranks; nothing computed changes", warn=True
    ),
    "contiguous_checkpointing": Inert(bool, "only places kept activations side by side in memory"),
    "checkpoint_in_cpu": absent_flag("kept activations stay on the device", "use checkpoint_activations alone"),
    "synchronize_each_layer": Inert(bool, "only waits for the device after each layer; nothing computed changes"),
    "profile_backward": Inert(bool, "only prints times of recomputation"),
    "activation_checkpointing": Rejected(
        "DeepSpeed's own dictionary is not read", "use checkpoint_activations and checkpoint_num_layers"
    ),
    "z_loss": Rejected("the auxiliary z-loss is not implemented", harmless=(0,), accepts=float),
    "char_level_ppl": absent_flag("perplexity is per token"),
    "use_mup": absent_flag(
        "muP changes initialization, learning rates and logits of every layer, and Pattention has no muP rule"
    ),
    "coord_check": absent_flag("a check of muP, which is not implemented"),
    "save_base_shapes": absent_flag("belongs to muP, which is not implemented"),
    "base_shapes_file": Inert(str, _MUP),
    "mup_attn_temp": Inert(float, _MUP),
    "mup_embedding_mult": Inert(float, _MUP),
    "mup_init_scale": Inert(float, _MUP),
    "mup_output_temp": Inert(float, _MUP),
    "mup_rp_embedding_mult": Inert(float, _MUP),
    "mup_width_scale": Inert(int, _MUP),
    "train_impl": Rejected(
        "only language modelling is implemented, no preference training", harmless=("normal",), accepts=str
    ),
    "dpo_beta": Inert(float, _PREFERENCES),
    "dpo_fp32": Inert(bool, _PREFERENCES),
    "dpo_reference_free": Inert(bool, _PREFERENCES),
    "kl_div_beta": Inert(float, _PREFERENCES),
    "kl_impl": Inert(Literal["abs", "mse", "kl", "full"], _PREFERENCES),
    "kto_beta": Inert(float, _PREFERENCES),
    "kto_desirable_weight": Inert(float, _PREFERENCES),
    "kto_undesirable_weight": Inert(float, _PREFERENCES),
    "kto_fp32": Inert(bool, _PREFERENCES),
    "fp32_reinforce": Inert(bool, _PREFERENCES),
    "reinforce_leave_one_out": Inert(bool, _PREFERENCES),
    "onnx_safe": absent_flag("models are not exported to ONNX"),
    "frozen_old": absent_flag(DELETED_EXPERIMENT),
    "old_lr_decay": absent_flag(DELETED_EXPERIMENT),
    "old_lr_decay_scale": Inert(float, "only read with old_lr_decay: true, which is refused"),
    "qkv_slot_num_new": Rejected(DELETED_EXPERIMENT, "set qkv_slot_num"),
    "proj_slot_num_new": Rejected(DELETED_EXPERIMENT, "set proj_slot_num"),
    "ffn_slot_num_new": Rejected(DELETED_EXPERIMENT, "set ffn_slot_num"),
    "scale_pretrain": Rejected(DELETED_EXPERIMENT, "use pretrain_partial_init"),
    "amp": Rejected("apex's mixed precision is not supported", "use precision: bfloat16 or fp16", accepts=dict),
}
