"""What the batch viewer shows is what training read, at one and at two data-parallel ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data.micro_batch import batch_hash, sample_digests
from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import train


@pytest.mark.parametrize("ranks", [1, 2])
def test_hashes_of_a_run_are_those_of_the_viewers_tokens(
    ranks: int, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(
        TOKENFORMER,
        train_iters=4,
        train_batch_size=16,
        train_micro_batch_size_per_gpu=4,
        gradient_accumulation_steps=None,
        log_batch_hashes=True,
    )
    train(config, ranks=ranks)
    lines = (config.with_suffix("") / "batch_hashes.jsonl").read_text().splitlines()
    recorded = {record["iteration"]: record["sha256"] for record in map(json.loads, lines)}
    array = tmp_path / "batches.npy"
    viewer = ["tools/datasets/batch_viewer.py", str(config), "--start", "2", "--end", "4", "--output", str(array)]
    finished = run_command(viewer)
    assert finished.returncode == 0, finished.stderr
    batches = np.load(array)
    assert batches.shape == (3, 16, 17)
    shown = {step: batch_hash(sample_digests(batch)) for step, batch in zip(range(2, 5), batches, strict=True)}
    assert list(recorded) == [1, 2, 3, 4]
    assert {step: recorded[step] for step in shown} == shown
    assert len(set(recorded.values())) == 4
