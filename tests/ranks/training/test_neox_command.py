"""NeoX's own first command trains here, and started again it goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

from megatron.monitor.metrics_file import read_records
from tests.helpers.neox_yamls import write_neox_yamls
from tests.helpers.runs import train

SMALLER = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "lr_decay_iters": 8,
    "train_iters": 8,
    "log_interval": 1,
    "eval_iters": 1,
    "num_workers": 0,
    "split": "'90,5,5'",
    "fp16": "null",
}
"""Sizes for a test, and float32 for a CPU."""


def test_125m_with_its_local_setup(dataset: Path, tmp_path: Path) -> None:
    write_neox_yamls(tmp_path / "configs")
    data = tmp_path / "data"
    (data / "enwik8").mkdir(parents=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(dataset.with_suffix(suffix), data / "enwik8" / f"enwik8_text_document{suffix}")
    vocabulary = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    (data / "gpt2-vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (data / "gpt2-merges.txt").write_text("#version: 0.2\n")
    words = ["-d", "configs", "local_setup.yml", *(f"{key}={value}" for key, value in SMALLER.items())]
    more = {"output": tmp_path, "before": os.chdir, "arguments": (tmp_path,)}
    first = train(Path("125M.yml"), *words, "train_iters=4", **more)
    assert "load: checkpoints is save, and holds no checkpoint yet" in first
    assert "starting from initial weights" in first
    again = train(Path("125M.yml"), *words, **more)
    assert "going on from" in again
    assert [record["iteration"] for record in read_records(tmp_path / "logs" / "metrics.jsonl")] == list(range(1, 9))
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "global_step8"
