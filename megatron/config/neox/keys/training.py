"""Keys that decide how the model is trained: batch, optimizer, schedule, precision, recomputation, evaluation."""

from __future__ import annotations

import math

from megatron.config.json_schema import BOOL, DICTIONARY, NUMBER, TEXT, WHOLE, one_of
from megatron.config.neox.keys.entries import (
    DELETED_EXPERIMENT,
    UNSET,
    Converted,
    Entry,
    Flat,
    Inert,
    MapsTo,
    RefusedError,
    Rejected,
    absent_flag,
)
from megatron.config.optimizer import optimizer_facts
from megatron.config.yaml.problems import YamlValue

_DTYPES = {"fp16": "fp16", "bfloat16": "bf16", "fp32": "fp32"}


def _dtype(value: YamlValue, flat: Flat) -> Converted:
    if not isinstance(value, str) or value not in _DTYPES:
        meant = {"float16": "fp16", "half": "fp16", "bf16": "bfloat16", "float32": "fp32", "float": "fp32"}
        guess = f"; did you mean {meant[value]}?" if isinstance(value, str) and value in meant else ""
        raise RefusedError(f"expected one of {', '.join(_DTYPES)}{guess}")
    return _DTYPES[value]


def _fp16_switch(value: YamlValue, flat: Flat) -> Converted:
    """True selects fp16, or bf16 with NeoX's older `fp16: {enabled: true, type: bfloat16}`."""
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
        raise RefusedError(f"the optimizer {value} is not implemented; use Adam, which is decoupled AdamW as in NeoX")
    return next(name for name in facts.names if name.lower() == str(value).lower())


def _decay_share(value: YamlValue, flat: Flat) -> Converted:
    train_iters = flat.get("train_iters")
    if flat.get("lr_decay_iters") is not None:
        raise RefusedError("lr_decay_iters is given too; keep one of them")
    if not isinstance(train_iters, int) or not isinstance(value, int | float):
        return UNSET
    return max(1, math.floor(train_iters * value))


_PREFERENCES = "only read with a train_impl other than normal, which is refused"
_MUP = "only read with use_mup: true, which is refused"
_FIXED_LOSS_SCALE = "DeepSpeed's fp16 dictionary decides, as in NeoX"

TRAINING_KEYS: dict[str, Entry] = {
    "seed": MapsTo("training.seed"),
    "train_iters": MapsTo("training.train_iters"),
    "train_epochs": Rejected("a run is measured in steps", "use train_iters"),
    "train_batch_size": MapsTo("training.train_batch_size"),
    "train_micro_batch_size_per_gpu": MapsTo("training.train_micro_batch_size_per_gpu"),
    "batch_size": MapsTo(
        "training.train_micro_batch_size_per_gpu", difference="NeoX overwrites it; here it is what its name says"
    ),
    "gradient_accumulation_steps": MapsTo("training.gradient_accumulation_steps"),
    "gas": MapsTo("training.gradient_accumulation_steps", difference="NeoX's old name of gradient_accumulation_steps"),
    "gradient_clipping": MapsTo(
        "training.gradient_clipping", difference="published NeoX runs that say 1.0 very likely did not clip; this does"
    ),
    "clip_grad": MapsTo("training.gradient_clipping"),
    "eval_interval": MapsTo("training.eval_interval"),
    "eval_iters": MapsTo("training.eval_iters"),
    "precision": MapsTo("training.precision.dtype", _dtype, one_of(*_DTYPES)),
    "fp16.enabled": MapsTo("training.precision.dtype", _fp16_switch, BOOL, meaning="Compute in fp16.", default=False),
    "fp16.fp16": MapsTo(
        "training.precision.dtype",
        _fp16_switch,
        BOOL,
        "DeepSpeed reads fp16.enabled alone",
        meaning="Another name of `fp16.enabled`.",
        default=False,
    ),
    "fp16.type": MapsTo(
        "training.precision.dtype",
        _fp16_type,
        one_of("fp16", "bfloat16"),
        "NeoX's older way to choose bf16",
        meaning="Which 16-bit format `fp16.enabled` selects.",
        default="fp16",
    ),
    "fp16.loss_scale": MapsTo("training.precision.loss_scale"),
    "fp16.initial_scale_power": MapsTo("training.precision.initial_scale_power"),
    "fp16.loss_scale_window": MapsTo("training.precision.loss_scale_window"),
    "fp16.hysteresis": MapsTo("training.precision.hysteresis"),
    "fp16.min_loss_scale": MapsTo("training.precision.min_loss_scale"),
    "fp16.auto_cast": absent_flag("inputs are token ids"),
    "fp16.consecutive_hysteresis": absent_flag("the loss scaler keeps DeepSpeed's default"),
    "fp16.fp16_master_weights_and_grads": absent_flag("master weights are fp32"),
    "bf16.enabled": MapsTo("training.precision.dtype", _bf16_switch, BOOL, meaning="Compute in bf16.", default=False),
    "deepspeed_extra_args.bf16.enabled": MapsTo(
        "training.precision.dtype", _bf16_switch, BOOL, meaning="Compute in bf16.", default=False
    ),
    "bf16.immediate_grad_update": absent_flag("gradients are accumulated in fp32 before the update"),
    "bf16.bf16_master_weights_and_grads": absent_flag("master weights are fp32"),
    "loss_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale", (0,), NUMBER),
    "dynamic_loss_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale: 0", (True,), BOOL),
    "hysteresis": Rejected(_FIXED_LOSS_SCALE, "use fp16.hysteresis", (2,), WHOLE),
    "loss_scale_window": Rejected(_FIXED_LOSS_SCALE, "use fp16.loss_scale_window", (1000,), NUMBER),
    "min_scale": Rejected(_FIXED_LOSS_SCALE, "use fp16.min_loss_scale", (1,), NUMBER),
    "optimizer.type": MapsTo("training.optimizer.type", _optimizer_type, TEXT, "other optimizers are not implemented"),
    "optimizer.params.lr": MapsTo("training.optimizer.lr", difference="must be given; NeoX's default is 0.001"),
    "optimizer.params.weight_decay": Rejected("NeoX gives it to Adam a second time and stops", "use weight_decay"),
    "optimizer_type": MapsTo("training.optimizer.type", _optimizer_type, TEXT, "NeoX overwrites it by optimizer.type"),
    "use_bnb_optimizer": absent_flag("bitsandbytes optimizers are not supported"),
    "lr": MapsTo("training.optimizer.lr", difference="NeoX overwrites it by optimizer.params.lr"),
    "weight_decay": MapsTo("training.optimizer.weight_decay"),
    "min_lr": MapsTo("training.lr_schedule.min_lr", difference="also held after the end of the decay"),
    "warmup": MapsTo("training.lr_schedule.warmup"),
    "lr_decay_style": MapsTo("training.lr_schedule.style", difference="inverse_sqrt and WSD are not in NeoX"),
    "lr_decay_iters": MapsTo("training.lr_schedule.decay_iters"),
    "lr_wsd_decay_style": MapsTo("training.lr_schedule.wsd_decay_style", difference="Megatron-LM's key, not NeoX's"),
    "lr_wsd_decay_iters": MapsTo("training.lr_schedule.wsd_decay_iters", difference="Megatron-LM's key, not NeoX's"),
    "lr_decay_fraction": MapsTo(
        "training.lr_schedule.decay_iters",
        _decay_share,
        NUMBER,
        meaning="Share of train_iters after which min_lr is reached; instead of lr_decay_iters.",
    ),
    "override_lr_scheduler": MapsTo("training.lr_schedule.override_lr_scheduler"),
    "use_checkpoint_lr_scheduler": MapsTo("training.lr_schedule.use_checkpoint_lr_scheduler"),
    "scheduler": Rejected("DeepSpeed's schedulers are not used", "use lr_decay_style, warmup and min_lr"),
    "checkpoint_activations": MapsTo("training.checkpoint_activations.enabled"),
    "checkpoint_num_layers": MapsTo("training.checkpoint_activations.num_layers"),
    "deepspeed_activation_checkpointing": Inert(BOOL, "chooses between two implementations of the same recomputation"),
    "partition_activations": Inert(
        BOOL, "saves memory by splitting kept activations over tensor ranks; nothing computed changes", warn=True
    ),
    "contiguous_checkpointing": Inert(BOOL, "only places kept activations side by side in memory"),
    "checkpoint_in_cpu": absent_flag("kept activations stay on the device", "use checkpoint_activations alone"),
    "synchronize_each_layer": Inert(BOOL, "only waits for the device after each layer; nothing computed changes"),
    "profile_backward": Inert(BOOL, "only prints times of recomputation"),
    "activation_checkpointing": Rejected(
        "DeepSpeed's own dictionary is not read", "use checkpoint_activations and checkpoint_num_layers"
    ),
    "exit_interval": MapsTo(
        "training.exit_interval", difference="saves first, and ends with the exit code that asks to be resumed"
    ),
    "exit_duration_in_mins": MapsTo("training.exit_duration_in_mins", difference="Megatron's key, not NeoX's"),
    "non_finite_policy": MapsTo("training.non_finite.policy", difference="not a NeoX key"),
    "non_finite_budget": MapsTo("training.non_finite.budget", difference="not a NeoX key"),
    "z_loss": Rejected("the auxiliary z-loss is not implemented", harmless=(0,), accepts=NUMBER),
    "char_level_ppl": absent_flag("perplexity is per token"),
    "use_mup": absent_flag(
        "muP changes initialization, learning rates and logits of every layer, and Pattention has no muP rule"
    ),
    "coord_check": absent_flag("a check of muP, which is not implemented"),
    "save_base_shapes": absent_flag("belongs to muP, which is not implemented"),
    "base_shapes_file": Inert(TEXT, _MUP),
    "mup_attn_temp": Inert(NUMBER, _MUP),
    "mup_embedding_mult": Inert(NUMBER, _MUP),
    "mup_init_scale": Inert(NUMBER, _MUP),
    "mup_output_temp": Inert(NUMBER, _MUP),
    "mup_rp_embedding_mult": Inert(NUMBER, _MUP),
    "mup_width_scale": Inert(WHOLE, _MUP),
    "train_impl": Rejected(
        "only language modelling is implemented, no preference training", harmless=("normal",), accepts=TEXT
    ),
    "dpo_beta": Inert(NUMBER, _PREFERENCES),
    "dpo_fp32": Inert(BOOL, _PREFERENCES),
    "dpo_reference_free": Inert(BOOL, _PREFERENCES),
    "kl_div_beta": Inert(NUMBER, _PREFERENCES),
    "kl_impl": Inert(TEXT, _PREFERENCES),
    "kto_beta": Inert(NUMBER, _PREFERENCES),
    "kto_desirable_weight": Inert(NUMBER, _PREFERENCES),
    "kto_undesirable_weight": Inert(NUMBER, _PREFERENCES),
    "kto_fp32": Inert(BOOL, _PREFERENCES),
    "fp32_reinforce": Inert(BOOL, _PREFERENCES),
    "reinforce_leave_one_out": Inert(BOOL, _PREFERENCES),
    "onnx_safe": absent_flag("models are not exported to ONNX"),
    "frozen_old": absent_flag(DELETED_EXPERIMENT),
    "old_lr_decay": absent_flag(DELETED_EXPERIMENT),
    "old_lr_decay_scale": Inert(NUMBER, "only read with old_lr_decay: true, which is refused"),
    "qkv_slot_num_new": Rejected(DELETED_EXPERIMENT, "set qkv_slot_num"),
    "proj_slot_num_new": Rejected(DELETED_EXPERIMENT, "set proj_slot_num"),
    "ffn_slot_num_new": Rejected(DELETED_EXPERIMENT, "set ffn_slot_num"),
    "scale_pretrain": Rejected(DELETED_EXPERIMENT, "use pretrain_partial_init"),
    "amp": Rejected("apex's mixed precision is not supported", "use precision: bfloat16 or fp16", accepts=DICTIONARY),
}
