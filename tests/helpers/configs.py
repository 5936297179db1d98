"""Configurations and data of tiny training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.formats.mmap import IndexedDatasetWriter

SEQ_LENGTH = 16
VOCAB_SIZE = 512

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": SEQ_LENGTH,
    "max_position_embeddings": SEQ_LENGTH,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "output_layer_init_method": "wang_init",
    "tokenizer_type": "CharLevelTokenizer",
    "train_iters": 20,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "weight_decay": 0.1,
    "gradient_clipping": 1.0,
    "lr_decay_style": "cosine",
    "lr_decay_iters": 30,
    "warmup": 0.1,
    "min_lr": 1e-4,
    "log_interval": 1,
    "eval_interval": 1000,
    "eval_iters": 1,
    "split": "90, 5, 5",
    "num_workers": 0,
    "seed": 7,
}
TOKENFORMER: dict[str, Any] = TINY | {
    "architecture": "tokenformer",
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "qkv_slot_num": 24,
    "proj_slot_num": 40,
    "ffn_slot_num": 48,
}
PYTHIA: dict[str, Any] = TINY | {
    "architecture": "gpt_neox",
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "bias_gelu_fusion": True,
    "init_method": "small_init",
}

GPT2: dict[str, Any] = TINY | {
    "architecture": "gpt2",
    # Three, so that two pipeline stages do not have the same number of them.
    "num_layers": 3,
    "pos_emb": "learned",
    "rotary_pct": 1.0,
    "scale_attn_by_inverse_layer_idx": True,
    "output_layer_init_method": "scaled_normal",
}
LLAMA: dict[str, Any] = TINY | {
    "architecture": "llama",
    "num_kv_heads": 2,
    "ffn_hidden_size": 88,
    "rotary_pct": 1.0,
    "rms_norm_epsilon": 1e-6,
    "no_weight_tying": True,
}


def write_dataset(prefix: Path) -> Path:
    """300 documents whose bytes are predictable enough to learn from, end-of-document 0; returns `prefix`."""
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(300):
            steps = rng.choice([1, 1, 1, 2, 7], size=rng.integers(5, 120))
            writer.add_document(np.concatenate([32 + np.cumsum(steps) % 90, [0]]))
    return prefix


def layout_keys(
    tensor: int = 1, pipe: int = 1, data: int = 1, *, batch: int = 8, accumulation: int = 1
) -> dict[str, Any]:
    """Keys of a layout whose global batch is `batch` samples, without evaluation."""
    return {
        "model_parallel_size": tensor,
        "pipe_parallel_size": pipe,
        "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": batch // (data * accumulation),
        "eval_iters": 0,
    }


BENCHMARKED: dict[str, Any] = {
    "architecture": "tokenformer",
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "norm": "layernorm_nonparam",
    "final_norm": "layernorm",
    "qkv_slot_num": 32,
    "proj_slot_num": 32,
    "ffn_slot_num": 64,
    "output_layer_init_method": "wang_init",
    "make_vocab_size_divisible_by": 16,
    "train_iters": 20,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "gradient_clipping": 0.5,
    "data_path": "nothing/here",
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "nothing/here.json",
}
