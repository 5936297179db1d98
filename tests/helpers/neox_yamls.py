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
_WANDB = {"use_wandb": True, "wandb_host": "https://api.wandb.ai", "wandb_project": "neox"}

_ZERO = {
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "contiguous_gradients": True,
}
_FP16 = {"enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
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
    "fp16": {"fp16": True, **_FP16},
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
_PYTHIA = {
    "rotary-pct": 0.25,
    "gpt_j_residual": True,
    "scaled-upper-triang-masked-softmax-fusion": True,
    "bias-gelu-fusion": True,
    "gas": 1,
    "num_workers": 1,
    "extra-save-iters": [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512],
    "fp16": {"fp16": True, "initial_scale_power": 12, **_FP16},
    "zero_optimization": {"stage": 1, "cpu_offload": False, **_ZERO},
    "tokenizer-type": "HFTokenizer",
}
_LLAMA = {
    "make_vocab_size_divisible_by": 1,
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-6,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "activation": "swiglu",
}


def _sized(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"num-layers": layers, "hidden-size": hidden, "num-attention-heads": heads}
    return _MODEL | _TRAINING | sizes | others


def _pythia(layers: int, hidden: int, heads: int, **others: Any) -> dict[str, Any]:
    return _sized(layers, hidden, heads, **_PYTHIA, **{"attention-config": [[["flash"], layers]]}, **others)


def _mamba(layers: int, hidden: int) -> dict[str, Any]:
    return _sized(
        layers, hidden, 12, **{"attention_config": [[["mamba"], layers]], "mamba_selective_scan_fusion": True}
    )


_125M = _sized(12, 768, 12)
_STAGE_0 = {"stage": 0, **_ZERO}

LOADABLE: dict[str, dict[str, Any]] = {
    "125M.yml": _125M | {"zero_optimization": _STAGE_0, "hostfile": "/mock_path"},
    "125M-json.yml": _125M | {"hostfile": "/mock_path"},
    "19M.yml": _sized(6, 512, 8, gas=1, num_workers=1)
    | {"deepspeed_extra_args": {"comms_logger": {"enabled": True, "verbose": True, "prof_all": True, "debug": False}}},
    "49M.yml": _sized(10, 640, 10, gas=1, num_workers=1, gpt_j_residual=True, rotary_pct=0.25),
    "350M.yml": _sized(24, 1024, 16),
    "760M.yml": _sized(24, 1536, 16, layernorm_fusion=True),
    "800M.yml": _sized(16, 2048, 8, gas=1, num_workers=1),
    "1B.yml": _sized(16, 2048, 8, fp16={"fp16": True, "auto_cast": True, **_FP16}),
    "1-3B.yml": _sized(24, 2048, 16),
    "2-7B.yml": _sized(32, 2560, 32),
    "6-7B.yml": _sized(32, 4096, 32),
    "13B.yml": _sized(40, 5120, 40, zero_optimization={"stage": 1, "cpu_offload": False, **_ZERO}),
    "175B.yml": _sized(96, 12_288, 96),
    "bf16_125M.yml": {key: value for key, value in _125M.items() if key != "fp16"}
    | {"precision": "bfloat16", "fp32_allreduce": True, "split": "949,50,1"},
    "bf16_420M.yml": {key: value for key, value in _sized(24, 1024, 16).items() if key != "fp16"}
    | {"precision": "bfloat16", "fp32_allreduce": True},
    "slurm_125M.yml": _125M | {"launcher": "slurm", "deepspeed_slurm": True, "comment": "neox"},
    "pythia/14M.yml": _pythia(6, 128, 4, **{"pipe-parallel-size": 0}),
    "pythia/31M.yml": _pythia(6, 256, 8, **{"pipe-parallel-size": 0}),
    "pythia/70M.yml": _pythia(6, 512, 8),
    "pythia/160M.yml": _pythia(12, 768, 12),
    "pythia/410M.yml": _pythia(24, 1024, 16),
    "pythia/1B.yml": _pythia(16, 2048, 8),
    "pythia/1-4B.yml": _pythia(24, 2048, 16),
    "pythia/2-8B.yml": _pythia(32, 2560, 32),
    "pythia/6-9B.yml": _pythia(32, 4096, 32, **{"model-parallel-size": 2}),
    "pythia/12B.yml": _pythia(36, 5120, 40, **{"model-parallel-size": 4}),
}
"""What NeoX's models are that exist here; each loads beside LOCAL_SETUP."""

NOT_HERE: dict[str, tuple[dict[str, Any], str]] = {
    "1-3B-transformer-engine.yml": (
        _sized(24, 2048, 16, te_layernorm_mlp=True, te_mha=True, te_fp8_format="hybrid"),
        "te_mha: true: known to NeoX, not supported here",
    ),
    "125M-dmoe.yml": (_sized(12, 1024, 16, moe_num_experts=8), "moe_num_experts: 8: known to NeoX, not supported here"),
    "125M-moe.yml": (_125M | {"moe_num_experts": 4}, "moe_num_experts: 4: known to NeoX, not supported here"),
    "bnb_125M.yml": (_125M | {"use_bnb_optimizer": True}, "use_bnb_optimizer: true: known to NeoX, not supported here"),
    "gmlp_small.yml": (
        _125M | {"attention_config": [[["gmlp"], "all"]], "gmlp_attn_dim": 64, "pos-emb": "none"},
        "attention type gmlp is not implemented",
    ),
    "sparse.yml": (
        _125M | {"attention_config": [[["local", "global"], "all"]], "sparsity_config": {"block": 16}},
        "attention type local is not implemented",
    ),
    "prof.yml": (
        _125M | {"profile": True, "memory_profiling": True},
        "profile: true: known to NeoX, not supported here",
    ),
    "llama/7B.yml": (_sized(32, 4096, 32, **_LLAMA), "activation: swiglu: swiglu is not implemented"),
    "llama2/70B.yml": (
        _sized(80, 8192, 64, **_LLAMA, num_kv_heads=8, intermediate_size=28_672),
        "num_kv_heads: 8: known to NeoX, not supported here: grouped-query attention is not implemented",
    ),
    "mistral/7B.yml": (
        _sized(32, 4096, 32, **_LLAMA, num_kv_heads=8, intermediate_size=14_336, sliding_window_width=4096),
        "sliding_window_width: 4096: known to NeoX, not supported here",
    ),
    "mamba/mamba-130M.yml": (_mamba(24, 768), "attention type mamba is not implemented"),
    "rwkv/170M.yml": (_125M | {"attention_config": [[["rwkv"], 12]]}, "attention type rwkv is not implemented"),
}
"""Those that ask for what is not implemented, and what is said of them; related files ask for the same."""


def write_neox_yamls(folder: Path) -> Path:
    """Write the files as NeoX does, in braces and with a trailing comma; returns the folder."""
    files = LOADABLE | {name: keys for name, (keys, _) in NOT_HERE.items()}
    setups = {"local_setup.yml": LOCAL_SETUP, "local_setup_wandb.yml": LOCAL_SETUP | _WANDB}
    for name, keys in (files | setups).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items())
        path.write_text(f"# as NeoX writes it\n{{\n{lines},\n}}\n")
    return folder
