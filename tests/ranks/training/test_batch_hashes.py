"""The hashes that a run records are those of the tokens that the batch viewer shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.micro_batch import batch_hash, sample_digests
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import train
from tools.datasets import batch_viewer


def assert_hashes_are_of_what_is_shown(run: Path, batch: int, output: Path) -> None:
    lines = (run / "batch_hashes.jsonl").read_text().splitlines()
    recorded = {record["iteration"]: record["sha256"] for record in map(json.loads, lines)}
    config = str(run.with_suffix(".yml"))
    assert batch_viewer.main([config, "--start", "2", "--end", "4", "--output", str(output)]) == 0
    batches = np.load(output)
    assert batches.shape == (3, batch, 17)
    shown = {step: batch_hash(sample_digests(rows)) for step, rows in zip(range(2, 5), batches, strict=True)}
    assert {step: recorded[step] for step in shown} == shown
    assert list(recorded) == list(range(1, len(recorded) + 1))
    assert len(set(recorded.values())) == len(recorded)


def test_one_rank(tokenformer_run: Path, tmp_path: Path) -> None:
    assert_hashes_are_of_what_is_shown(tokenformer_run, 8, tmp_path / "batches.npy")


def test_two_data_parallel_ranks(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(
        TOKENFORMER,
        train_iters=4,
        train_batch_size=16,
        train_micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=None,
        log_batch_hashes=True,
    )
    train(config, ranks=2)
    assert_hashes_are_of_what_is_shown(config.with_suffix(""), 16, tmp_path / "batches.npy")
