"""Keys of the YAMLs that GPT-NeoX ships, by their names there: what each asks for, beside what most of them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOCAL_SETUP: dict[str, Any] = {
    "data-path": "data/enwik8/enwik8_text_document",
    "vocab-file": "data/gpt2-vocab.json",
    "merge-file": "data/gpt2-merges.txt",
    "save": "checkpoints",
    "load": "checkpoints",
    "checkpoint_validation_with_forward_pass": False,
    "tensorboard-dir": "tensorboard",
    "log-dir": "logs",
}
WANDB = {"use_wandb": True, "wandb_host": "https://api.wandb.ai", "wandb_project": "neox"}
_PILE = {f"{split}-data-paths": ["/data/pile_text_document"] for split in ("train", "valid", "test")}

_ZERO = {
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "contiguous_gradients": True,
}
_STAGE_0 = {"stage": 0, **_ZERO}
_SCALER = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
_POWER_12 = {**_SCALER, "initial_scale_power": 12}
_TRAINING: dict[str, Any] = {
    "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1e-8}},
    "min_lr": 0.00006,
    "zero_optimization": {"stage": 1, **_ZERO},
    "train_micro_batch_size_per_gpu": 4,
    "data-impl": "mmap",
    "checkpoint-activations": True,
    "checkpoint-num-layers": 1,
    "partition-activations": True,
    "synchronize-each-layer": True,
    "gradient_clipping": 1.0,
    "weight-decay": 0.1,
    "hidden-dropout": 0,
    "attention-dropout": 0,
    "fp16": {"fp16": True, "enabled": True, **_SCALER},
    "train-iters": 320_000,
    "lr-decay-iters": 320_000,
    "distributed-backend": "nccl",
    "lr-decay-style": "cosine",
    "warmup": 0.01,
    "checkpoint-factor": 10_000,
    "eval-interval": 1000,
    "eval-iters": 10,
    "log-interval": 100,
    "steps_per_print": 10,
    "keep-last-n-checkpoints": 4,
    "wall_clock_breakdown": True,
}
_MODEL: dict[str, Any] = {
    "pipe-parallel-size": 1,
    "model-parallel-size": 1,
    "seq-length": 2048,
    "max-position-embeddings": 2048,
    "norm": "layernorm",
    "pos-emb": "rotary",
    "no-weight-tying": True,
    "gpt_j_residual": False,
    "output_layer_parallelism": "column",
    "scaled-upper-triang-masked-softmax-fusion": False,
    "bias-gelu-fusion": False,
    "rope_fusion": False,
    "layernorm_fusion": False,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
}
_SMALL = {
    "gradient_accumulation_steps": 1,
    "num_workers": 1,
    "fp16": {"fp16": True, "enabled": True, **_POWER_12},
}
_PYTHIA = {
    "rotary-pct": 0.25,
    "gpt_j_residual": True,
    "scaled-upper-triang-masked-softmax-fusion": True,
    "bias-gelu-fusion": True,
    "num_workers": 1,
    "extra-save-iters": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "fp16": {"fp16": True, "enabled": True, **_POWER_12},
    "zero_optimization": {"stage": 1, "cpu_offload": False, **_ZERO},
    "tokenizer-type": "HFTokenizer",
}
_LLAMA = {
    "make_vocab_size_divisible_by": 1,
    "rotary_pct": 1,
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-6,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "scaled-upper-triang-masked-softmax-fusion": True,
}
_SILU = {"mlp_type": "llama", "activation": "silu"}
_SWIGLU = {"activation": "swiglu", "mlp_multiple_of": 256}
_70B = {"num_kv_heads": 8, "intermediate_size": 86_016, "attention-config": [[["flash"], 80]]}
_BF16 = {"precision": "bfloat16", "fp32_allreduce": True, "bf16": {"enabled": True}}


def _sized(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"num-layers": layers, "hidden-size": hidden, "num-attention-heads": heads}
    return _MODEL | _TRAINING | sizes | others


def _pythia(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    return _sized(layers, hidden, heads, **(_PYTHIA | {"attention-config": [[["flash"], layers]]} | others))


def _tiny_pythia(hidden: int, heads: int) -> dict[str, Any]:
    stage = {"zero_optimization": {**_STAGE_0, "cpu_offload": False}}
    kept = {"pipe-parallel-size": 0, "checkpoint-activations": False, "partition-activations": False}
    return _pythia(6, hidden, heads, **stage, **kept, **_PILE, **{"vocab-file": "/data/20B_tokenizer.json"})


def _without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def _llama(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    return _sized(layers, hidden, heads, **_LLAMA, **others)


def _mamba(layers: int, hidden: int) -> dict[str, Any]:
    mamba = {"attention_config": [[["mamba"], layers]], "mamba_selective_scan_fusion": True, "activation": "silu"}
    initial = {"output_layer_init_method": "single_residual_scaled_normal"}
    keys = _sized(layers, hidden, 12, norm="rmsnorm", rms_norm_epsilon=1e-5, **mamba, **initial)
    return _without(keys, "pos-emb", "no-weight-tying", "gpt_j_residual")


def _llama2(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    return _llama(layers, hidden, heads, **_SWIGLU, **others)


LLAMAS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "llama/7B.yml": (_llama(32, 4096, 32, **_SILU), 11_008, 32, 6_738_415_616),
    "llama/30B.yml": (_llama(60, 6656, 52, **_SILU), 17_920, 52, 32_528_943_616),
    "llama2/7B.yml": (_llama2(32, 4096, 32, intermediate_size=32_768), 11_008, 32, 6_738_415_616),
    "llama2/13B.yml": (_llama2(40, 5120, 40, intermediate_size=41_472), 13_824, 40, 13_015_864_320),
    "llama2/70B.yml": (_llama2(80, 8192, 64, **_70B), 28_672, 8, 68_976_648_192),
    "codellama/34B.yml": (
        _without(
            _llama(
                48, 8192, 64, **_SILU, **_BF16, attention_type="groupedquery", num_kv_heads=8, rotary_emb_base=10**6
            ),
            "fp16",
        ),
        22_016,
        8,
        33_743_970_304,
    ),
}
"""Models of LLaMA's kind, with the width of their MLP, their heads of keys and values, and their parameters with 32,000
rows of vocabulary, as published with the weights."""

_125M = _sized(12, 768, 12) | {"fp16": {"enabled": True, **_SCALER}}
_MOE = {
    "moe_num_experts": 4,
    "moe_token_dropping": True,
    "moe_expert_parallel_size": 1,
    "enable_expert_tensor_parallelism": True,
}

LOADABLE: dict[str, dict[str, Any]] = {
    "125M.yml": _125M | {"hostfile": "/mock_path"},
    "125M-json.yml": _125M | {"hostfile": "/mock_path"},
    "19M.yml": _sized(6, 512, 8, **_SMALL)
    | {"deepspeed_extra_args": {"comms_logger": {"enabled": True, "verbose": True, "prof_all": True, "debug": False}}},
    "prof.yml": _125M
    | {"profile": True, "profile_step_start": 10, "profile_step_stop": 12}
    | {"memory_profiling": True, "memory_profiling_path": "tensorboard"},
    "49M.yml": _sized(10, 640, 10, **_SMALL, rotary_pct=0.25) | {"gpt_j_residual": True},
    "350M.yml": _sized(24, 1024, 16),
    "760M.yml": _sized(24, 1536, 16, layernorm_fusion=True),
    "800M.yml": _sized(16, 2048, 8, **_SMALL),
    "1B.yml": _without(_sized(16, 2048, 8, **_SMALL, gas=1), "gradient_accumulation_steps"),
    "1-3B.yml": _sized(24, 2048, 16),
    "2-7B.yml": _sized(32, 2560, 32),
    "6-7B.yml": _sized(32, 4096, 32),
    "13B.yml": _sized(40, 5120, 40),
    "175B.yml": _sized(96, 12_288, 96),
    "bf16_125M.yml": _without(_125M, "fp16", "init_method", "output_layer_init_method", "min_lr")
    | {"precision": "bfloat16", "fp32_allreduce": True, "split": "949,50,1", "zero_optimization": _STAGE_0},
    "slurm_125M.yml": _125M
    | {"zero_optimization": _STAGE_0, "launcher": "slurm", "deepspeed_slurm": True, "comment": "neox"},
    "pythia/70M.yml": _pythia(6, 512, 8),
    "pythia/160M.yml": _pythia(12, 768, 12),
    "pythia/410M.yml": _pythia(24, 1024, 16),
    "pythia/1B.yml": _without(_pythia(16, 2048, 8, fp32_allreduce=True), "attention-config")
    | {
        "fp16": {"enabled": True, "type": "bfloat16", "auto_cast": True, **_POWER_12},
        "zero_optimization": {**_STAGE_0, "cpu_offload": False},
    },
    "pythia/1-4B.yml": _pythia(24, 2048, 16),
    "pythia/2-8B.yml": _pythia(32, 2560, 32, log_grad_norm=True),
    "pythia/6-9B.yml": _pythia(32, 4096, 32, **{"model-parallel-size": 2}),
    "pythia/12B.yml": _pythia(36, 5120, 40, **{"model-parallel-size": 4, "log_grad_norm": True}),
    **{name: keys for name, (keys, *_) in LLAMAS.items()},
}
"""What NeoX's models are that exist here; each loads beside LOCAL_SETUP."""

ALONE: dict[str, dict[str, Any]] = {
    "20B.yml": _sized(44, 6144, 64, **{"pipe-parallel-size": 4, "model-parallel-size": 2, "gpt_j_residual": True})
    | LOCAL_SETUP
    | {"tokenizer_type": "HFTokenizer", "split": "995,4,1"},
    "pythia/14M.yml": _tiny_pythia(128, 4),
    "pythia/31M.yml": _tiny_pythia(256, 8),
    "finetuning_configs/6-9B.yml": _pythia(32, 4096, 32, load="/path/to/checkpoint", finetune=True)
    | {"zero_optimization": {"stage": 1, "load_from_fp32_weights": False, **_ZERO}, **_PILE},
    "bf16_with_its_fp16_keys.yml": _without(_125M, "fp16")
    | {"bf16": {"bf16": True, "enabled": True, "auto_cast": True, **_POWER_12}, **_PILE},
}
"""Those that name their own data, so that LOCAL_SETUP contradicts them; the last is a user's, who turned to bf16."""

NOT_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "1-3B-transformer-engine.yml": (
        _sized(24, 2048, 16, te_layernorm_mlp=True, te_mha=True, te_fp8_format="hybrid"),
        "te_mha: true: known to NeoX, not supported here",
    ),
    "125M-dmoe.yml": (
        _125M | _MOE | {"moe_type": "megablocks", "moe_token_dropping": False},
        "moe_num_experts: 4: known to NeoX, not supported here",
    ),
    "125M-moe.yml": (
        _125M | _MOE | {"moe_type": "deepspeed"},
        "moe_num_experts: 4: known to NeoX, not supported here",
    ),
    "bnb_125M.yml": (_125M | {"use_bnb_optimizer": True}, "use_bnb_optimizer: true: known to NeoX, not supported here"),
    "gmlp_small.yml": (
        _125M | {"attention_config": [[["gmlp"], "all"]], "gmlp_attn_dim": 64, "pos-emb": "none"},
        "attention type gmlp is not implemented",
    ),
    "sparse.yml": (
        _125M | {"attention_config": [[["local", "global"], "all"]], "sparsity_config": {"block": 16}},
        "attention type local is not implemented",
    ),
    "llama/13B.yml": (
        _llama(40, 5120, 40, **{"model-parallel-size": 2}, **_SILU),
        "make_vocab_size_divisible_by 1; nearest valid value: 1, or give padded_vocab_size, or pad as NeoX does on so "
        "many ranks, with make_vocab_size_divisible_by: 2",
    ),
    "llama2/70B-tp16.yml": (
        _llama2(80, 8192, 64, **_70B, padded_vocab_size=32_000) | {"model-parallel-size": 16},
        "16: is above num_kv_heads 8, and each rank holds whole heads of keys and values; nearest valid value: 8",
    ),
    "llemma/7B.yml": (
        _without(_llama(32, 4096, 32, **_SILU, **_BF16, decay_lr_to=0.033, warmup_iters=500), "fp16", "warmup"),
        "warmup_iters: 500: known to NeoX, not supported here: the warmup is not given in steps; use warmup, its share "
        "of lr_decay_iters",
    ),
    "mistral/7B.yml": (
        _llama(32, 4096, 32, **_SILU, num_kv_heads=8, intermediate_size=14_336, sliding_window_width=4096),
        "sliding_window_width: 4096: known to NeoX, not supported here",
    ),
    "mamba/mamba-130M.yml": (_mamba(24, 768), "attention type mamba is not implemented"),
    "rwkv/170M.yml": (
        _without(_125M, "fp16", "pos-emb")
        | {"attention_config": [[["rwkv"], 12]], "bf16": {"bf16": True, "enabled": True, **_POWER_12}},
        "attention type rwkv is not implemented",
    ),
}
"""Those that ask for what is not implemented, and what is said of them; related files ask for the same."""


def write_neox_yamls(folder: Path) -> Path:
    """Write the files as NeoX does, in braces and with a trailing comma; returns the folder."""
    files = LOADABLE | ALONE | {name: keys for name, (keys, _) in NOT_HERE.items()}
    setups = {"local_setup.yml": LOCAL_SETUP, "local_setup_wandb.yml": LOCAL_SETUP | WANDB}
    for name, keys in (files | setups).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items())
        path.write_text(f"# as NeoX writes it\n{{\n{lines},\n}}\n")
    return folder
