"""Small checkpoints on disk, without an engine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.store.manifest import MANIFEST_FILE, describe_file
from megatron.checkpointing.store.publish import begin, complete
from megatron.checkpointing.store.run_state import RunState
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import TrainingConfig

STATE = RunState(
    iteration=10,
    consumed_train_samples=160,
    consumed_valid_samples=32,
    schedule_steps=10,
    non_finite_steps=0,
    train_index_samples=1000,
    valid_index_samples=100,
    data_fingerprint={"seq_length": "8"},
    tensor_parallel_size=1,
    pipe_parallel_size=1,
    data_parallel_size=1,
    vocab_size=100,
    padded_vocab_size=128,
)
CONFIG = RunConfig(
    model=ModelConfig(
        architecture="gpt_neox",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        seq_length=8,
        max_position_embeddings=8,
        pos_emb="rotary",
    ),
    training=TrainingConfig(train_iters=10, optimizer=AdamWConfig(lr=1e-3)),
)


def save(folder: Path, iteration: int, run_id: str = "run", tensors: Any = None, config: RunConfig = CONFIG) -> Path:
    """Publish global_step`iteration` with one tensor file in `folder`; returns its path."""
    temporary = begin(folder, iteration)
    content = torch.arange(1000) + iteration if tensors is None else tensors
    files = {"layer_00.pt": write_tensors(content, temporary / "layer_00.pt")}
    state = replace(STATE, iteration=iteration)
    return complete(temporary, files, state, config, run_id=run_id, versions={"torch": torch.__version__})


def reseal(path: Path) -> None:
    """Makes a checkpoint's manifest anew, as somebody does who wants it to look whole."""
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    del manifest["sha256"]
    manifest["files"] = {name: asdict(describe_file(path / name)) for name in manifest["files"]}
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    (path / MANIFEST_FILE).write_text(json.dumps(manifest | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}))
