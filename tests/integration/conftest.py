"""Tiny datasets and runs through the commands that users type."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron.data.indexed_dataset import IndexedDatasetWriter

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset of 300 documents whose bytes are predictable enough to learn from, end-of-document 0."""
    prefix = tmp_path_factory.mktemp("dataset") / "text_document"
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(300):
            steps = rng.choice([1, 1, 1, 2, 7], size=rng.integers(5, 120))
            writer.add_document(np.concatenate([32 + np.cumsum(steps) % 90, [0]]))
    return prefix


@pytest.fixture
def write_config(tmp_path: Path, dataset: Path) -> Callable[..., Path]:
    """Write a YAML from a base and changes; data, checkpoints and index caches go to the test's folder."""

    def write(base: dict[str, Any], name: str = "tiny", **changes: Any) -> Path:
        folders = {"data_path": str(dataset), "save": str(tmp_path / name), "index_cache_dir": str(tmp_path / "index")}
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(base | folders | changes))
        return path

    return write


def run_command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root folder, without a GPU."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train(config: Path, *overrides: str) -> None:
    """`python deepy.py train.py CONFIG OVERRIDES`; fails with the run's output when it fails."""
    finished = run_command(["deepy.py", "train.py", str(config), *overrides])
    assert finished.returncode == 0, finished.stdout + finished.stderr


def records(run: Path, key: str) -> dict[int, float]:
    """iteration -> value of one key of a run's metrics.jsonl, where it was recorded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows if key in row}
