"""Runs that are refused before their engine is built: by what they would go on from, read or write to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.checkpointing.store.publish import begin, complete
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.load_config import load_config
from megatron.data.formats.mmap import IndexedDatasetWriter
from megatron.errors import CheckpointError, EnvironmentSetupError
from megatron.mpu.context import ParallelContext
from megatron.training import pretrain
from megatron.training.build_engine import BuiltEngine, require_hardware
from megatron.training.run_start import adopt_schedule, find_start
from megatron.training.stop_request import StopRequest
from megatron.training.training_context import TrainingRun, initial_run_state
from tests.helpers.configs import PYTHIA, TOKENFORMER


def assemble(config: Path, *overrides: str) -> TrainingRun:
    """Assembles all of a run but what needs ranks: its engine, and the description that counts them."""
    loaded = load_config([config], overrides)
    start = find_start(loaded.run)
    run = adopt_schedule(loaded.run, start)
    parts = {"build_engine": lambda *_: BuiltEngine(*[cast(Any, None)] * 4), "describe_run": lambda *_: {}}
    with mock.patch.multiple(pretrain, **parts):
        return pretrain.assemble(run, loaded.batch(1), ParallelContext.single(), config.parent, start, StopRequest())


def save(config: Path, iteration: int, *overrides: str) -> Path:
    """Publishes the checkpoint that the run would have after `iteration` steps, with other tensors; returns `save`."""
    run = assemble(config, *overrides)
    state = initial_run_state(run.data.counts, run.data.fingerprint, run.vocab, run.parallel)
    folder = config.with_suffix("")
    temporary = begin(folder, iteration)
    names = ("layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt")
    files = {name: write_tensors(torch.zeros(3), temporary / name) for name in names}
    complete(temporary, files, replace(state, iteration=iteration), run.config, run_id=run.run_id, versions={})
    return folder


def test_a_fresh_run_does_not_write_among_the_checkpoints_of_another(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER)
    save(config, 1)
    with pytest.raises(CheckpointError, match=r"already holds checkpoints of another run\. Set `auto_resume: true`"):
        assemble(config)
    assemble(config, "auto_resume=true")


def test_nothing_to_load(write_config: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"load: .*nowhere holds no checkpoint"):
        assemble(write_config(TOKENFORMER), f"load={tmp_path / 'nowhere'}")


def test_a_checkpoint_of_another_model(write_config: Callable[..., Path]) -> None:
    folder = save(write_config(TOKENFORMER), 1)
    with pytest.raises(CheckpointError, match="architecture: checkpoint tokenformer, configuration gpt_neox"):
        assemble(write_config(PYTHIA, "other"), f"load={folder}")


def test_another_schedule_is_refused_unless_chosen(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER)
    resume = [f"load={save(config, 4)}", "min_lr=5e-4"]
    with pytest.raises(CheckpointError, match=r"min_lr: checkpoint 0\.0001, configuration 0\.0005"):
        assemble(config, *resume)
    chosen = {"override_lr_scheduler": 5e-4, "use_checkpoint_lr_scheduler": 1e-4}
    for key, min_lr in chosen.items():
        run = assemble(config, *resume, f"{key}=true")
        assert run.config.training.lr_schedule.min_lr == min_lr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data_path={folder}/other_token/{name}", r"data_path \(\.bin\): checkpoint"),
        ("data_path={folder}/other_documents/{name}", r"data_path \(\.idx\): checkpoint"),
        ("seq_length=8", "seq_length: checkpoint 16, this run 8"),
        ("seed=8", "seed: checkpoint 7, this run 8"),
        ("split=80, 10, 10", r"split: checkpoint 0\.9, 0\.05, 0\.05, this run 0\.8, 0\.1, 0\.1"),
    ],
    ids=["tokens", "documents", "sequence length", "seed", "split"],
)
def test_changed_data_is_refused_unless_allowed(
    change: str, message: str, write_config: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    config = write_config(TOKENFORMER, auto_resume=True)
    save(config, 2)
    for name in ("moved", "other_token", "other_documents"):
        (tmp_path / name).mkdir()
        for suffix in (".bin", ".idx"):
            shutil.copy(dataset.with_suffix(suffix), tmp_path / name)
    tokens = np.fromfile(dataset.with_suffix(".bin"), np.uint16)
    with IndexedDatasetWriter(tmp_path / "other_documents" / dataset.name, np.dtype(np.uint16)) as writer:
        for piece in np.array_split(tokens, 100):
            writer.add_document(piece)
    tokens[5] += 1
    tokens.tofile(tmp_path / "other_token" / f"{dataset.name}.bin")

    assemble(config, f"data_path={tmp_path / 'moved' / dataset.name}")
    override = change.format(folder=tmp_path, name=dataset.name)
    with pytest.raises(CheckpointError, match=rf"{message}(.|\n)*`allow_changed_data: true`"):
        assemble(config, override)
    assemble(config, override, "allow_changed_data=true")


def test_a_changed_tokenizer_is_refused_unless_allowed(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """The same number of tokens, one of which is another."""
    vocabulary = {"tokens": [f"t{number}" for number in range(511)] + ["<eod>"]}
    files = [tmp_path / name for name in ("first.json", "second.json")]
    for file in files:
        entries = {token: number for number, token in enumerate(vocabulary["tokens"])}
        tokenizer = Tokenizer(WordLevel(entries, unk_token="t0"))  # noqa: S106 - a token of text
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.save(str(file))
        vocabulary["tokens"][5] = "other"
    config = write_config(TOKENFORMER, tokenizer_type="HFTokenizer", auto_resume=True)
    save(config, 2, f"vocab_file={files[0]}")
    with pytest.raises(CheckpointError, match=r"vocab_file: checkpoint sha256(.|\n)*`allow_changed_data: true`"):
        assemble(config, f"vocab_file={files[1]}")
    assemble(config, f"vocab_file={files[1]}", "allow_changed_data=true")
    with pytest.raises(CheckpointError, match=r"a vocabulary of 513 tokens padded to .* this run one of 512"):
        assemble(config, "tokenizer_type=CharLevelTokenizer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is computed on GPUs")
def test_fp16_on_a_cpu(write_config: Callable[..., Path]) -> None:
    run = load_config([write_config(TOKENFORMER, fp16={"enabled": True})]).run
    with pytest.raises(EnvironmentSetupError, match="precision: bfloat16"):
        require_hardware(run)
