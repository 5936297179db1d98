"""What goes wrong before or while training starts: a clear error, a non-zero exit code, nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron.data.formats.mmap import IndexedDatasetWriter
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.runs import fails_with, run_ranks, train


def test_fp16_on_a_cpu(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, fp16={"enabled": True})
    assert run_ranks(config, "--check").code == 0
    assert "precision: bfloat16" in fails_with(config)


def test_nothing_to_load(write_config: Callable[..., Path], tmp_path: Path) -> None:
    error = fails_with(write_config(TOKENFORMER), f"load={tmp_path / 'nowhere'}")
    assert "nowhere holds no checkpoint" in error and "load" in error


def test_a_save_folder_that_cannot_be_made(write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "save: " in fails_with(write_config(TOKENFORMER), f"save={tmp_path / 'file' / 'run'}")


def test_token_ids_beyond_the_vocabulary(write_config: Callable[..., Path], tmp_path: Path) -> None:
    prefix = tmp_path / "big" / "text_document"
    prefix.parent.mkdir()
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(100):
            writer.add_document(np.full(40, 600))
    error = fails_with(write_config(TOKENFORMER, data_path=str(prefix)))
    assert str(prefix) in error and "600" in error and "ends at 511" in error


def test_a_dataset_too_small_for_its_split(write_config: Callable[..., Path], tmp_path: Path) -> None:
    prefix = tmp_path / "small" / "text_document"
    prefix.parent.mkdir()
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_document(np.arange(10))
    error = fails_with(write_config(TOKENFORMER, data_path=str(prefix)))
    assert str(prefix) in error


def test_a_checkpoint_of_another_model(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=1)
    train(config)
    other = write_config(PYTHIA, "other", train_iters=1)
    error = fails_with(other, f"load={config.with_suffix('')}")
    assert "architecture: checkpoint tokenformer, configuration gpt_neox" in error
