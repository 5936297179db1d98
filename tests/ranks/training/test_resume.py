"""Twenty steps equal ten, a resume, and ten more, bit for bit; and what a resume refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron.data.formats.mmap import IndexedDatasetWriter
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint

CURVES = ("train/lm_loss", "train/grad_norm", "train/learning_rate", "valid/lm_loss", "test/lm_loss", "consumed_tokens")


def assert_same_run(ours: Path, theirs: Path, steps: int) -> None:
    for key in CURVES:
        assert records(ours, key) == records(theirs, key), key
    assert list(records(ours, "train/lm_loss")) == list(range(1, steps + 1))
    assert_same_checkpoint(ours / f"global_step{steps}", theirs / f"global_step{steps}")


def disturb_generators() -> None:
    """No random state that a process starts with may matter."""
    import random

    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("base", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    base: dict[str, Any], precision: str, ranks: int, write_config: Callable[..., Path]
) -> None:
    """Through validations, over the end of an epoch (six steps are one), with dropout and loader workers."""
    changes = {
        "train_micro_batch_size_per_gpu": 4 // ranks,
        "precision": precision,
        "num_workers": 2,
        "eval_interval": 5,
        "split": "5, 90, 5",
        "hidden_dropout": 0.1 if base is PYTHIA else 0.0,
        "attention_dropout": 0.1 if base is PYTHIA else 0.0,
    }
    whole = write_config(base, "whole", **changes)
    train(whole, ranks=ranks)
    halves = write_config(base, "halves", **changes, auto_resume=True, exit_interval=10)
    assert run_ranks(halves, ranks=ranks).code == 75
    assert run_ranks(halves, ranks=ranks, before=disturb_generators).code == 0
    assert_same_run(whole.with_suffix(""), halves.with_suffix(""), 20)


def test_every_row_is_one_logged_step(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=7, log_interval=3, eval_interval=2, auto_resume=True)
    train(config)
    rows = [json.loads(line) for line in (config.with_suffix("") / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [2, 3, 4, 6, 7]
    assert [row["consumed_tokens"] for row in rows] == [row["iteration"] * 8 * 16 for row in rows]
    assert [row["iteration"] for row in rows if "valid/lm_loss" in row] == [2, 4, 6, 7]
    assert [row["iteration"] for row in rows if "test/lm_loss" in row] == [7]
    train(config)
    assert len((config.with_suffix("") / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_longer_run_keeps_the_data_order(write_config: Callable[..., Path]) -> None:
    # Six steps fit into one epoch of these few documents and twelve need two, which are shuffled together.
    few = {"split": "5, 90, 5"}
    long = write_config(TOKENFORMER, "long", train_iters=12, **few)
    train(long)
    short = write_config(TOKENFORMER, "short", train_iters=6, **few)
    train(short)
    before = records(short.with_suffix(""), "train/lm_loss")
    assert before[1] != records(long.with_suffix(""), "train/lm_loss")[1]
    train(short, "train_iters=12", "auto_resume=true")
    after = records(short.with_suffix(""), "train/lm_loss")
    assert list(after) == list(range(1, 13))
    assert before.items() <= after.items()
    state = json.loads((short.with_suffix("") / "global_step12" / "state.json").read_text())
    assert (state["consumed_train_samples"], state["train_index_samples"]) == (96, 48)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 4), (1, 2)), ((1, 8), (2, 2)), ((2, 2), (1, 8))], ids=["micro batch", "1 to 2", "2 to 1"]
)
def test_another_layout_of_the_batch_reads_the_same_samples(
    before: tuple[int, int], after: tuple[int, int], write_config: Callable[..., Path]
) -> None:
    """(ranks, micro batch) before and after a resume, of 16 samples a step."""
    batch = {"train_batch_size": 16, "gradient_accumulation_steps": None, "log_batch_hashes": True, "train_iters": 6}
    batch |= {"split": "5, 90, 5"}
    whole = write_config(TOKENFORMER, "whole", **batch, train_micro_batch_size_per_gpu=8)
    train(whole)
    config = write_config(TOKENFORMER, "parts", **batch, auto_resume=True, exit_interval=3)
    assert run_ranks(config, f"train_micro_batch_size_per_gpu={before[1]}", ranks=before[0]).code == 75
    train(config, f"train_micro_batch_size_per_gpu={after[1]}", ranks=after[0])
    hashes = [path.with_suffix("") / "batch_hashes.jsonl" for path in (whole, config)]
    assert hashes[0].read_text() == hashes[1].read_text()
    assert len(hashes[0].read_text().splitlines()) == 6
    losses = [records(path.with_suffix(""), "train/lm_loss") for path in (whole, config)]
    assert losses[1][4] == pytest.approx(losses[0][4], abs=1e-6)


def test_a_fresh_run_does_not_write_among_the_checkpoints_of_another(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=1)
    train(config)
    finished = run_ranks(config)
    assert finished.code == 1
    assert "already holds checkpoints of another run. Set `auto_resume: true`" in finished.output


def test_another_schedule_is_refused_unless_chosen(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=4)
    train(config)
    run = config.with_suffix("")
    resume = ["train_iters=6", f"load={run}", "iteration=4"]
    finished = run_ranks(config, *resume, "min_lr=5e-4")
    assert finished.code == 1
    assert "min_lr: checkpoint 0.0001, configuration 0.0005" in finished.output
    train(config, *resume, "min_lr=9e-4", "override_lr_scheduler=true")
    assert records(run, "train/learning_rate")[6] > 9e-4
    train(config, *resume, "min_lr=5e-4", "use_checkpoint_lr_scheduler=true")
    assert records(run, "train/learning_rate")[6] == pytest.approx(1e-4 + 4.5e-4 * (1 + math.cos(math.pi * 2 / 27)))


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_changed_hyperparameters_take_effect(precision: str, write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, precision=precision, train_iters=3, auto_resume=True, exit_interval=2)
    assert run_ranks(config).code == 75
    betas = "optimizer.params.betas=[0.5, 0.6]"
    train(config, betas, "optimizer.params.eps=1e-5", "weight_decay=0.3", "gradient_clipping=0.25")
    [file] = (config.with_suffix("") / "global_step3").glob("*optim_states.pt")
    # A file of the test's own making; it holds DeepSpeed's LossScaler.
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    groups = saved["base_optimizer_state"]["param_groups"]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.6), 1e-5)}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert saved["clip_grad"] == 0.25


def test_going_back_makes_a_branch_that_is_gone_on_from(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=6, checkpoint_factor=2)
    train(config)
    run = config.with_suffix("")
    shutil.copytree(run / "global_step6", run.parent / "first" / "global_step6")
    back = run_ranks(config, f"load={run}", "iteration=2", "exit_interval=3")
    assert back.code == 75
    train(config, "auto_resume=true")
    assert "`latest`" not in back.output
    assert_same_checkpoint(run / "global_step6", run.parent / "first" / "global_step6")
    assert (run / "latest").read_text() == "global_step6\n"


def test_finetuning_takes_the_weights_only(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=3)
    train(config)
    tuned = write_config(TOKENFORMER, "tuned", train_iters=2, extra_save_iters=[0], train_micro_batch_size_per_gpu=2)
    train(tuned, f"load={config.with_suffix('')}", "finetune=true", ranks=2)
    file = "layer_01-model_00-model_states.pt"
    start = torch.load(tuned.with_suffix("") / "global_step0" / file, weights_only=True)
    trained = torch.load(config.with_suffix("") / "global_step3" / file, weights_only=True)
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert list(records(tuned.with_suffix(""), "train/lm_loss")) == [1, 2]


def test_without_the_optimizers_state_weights_place_and_schedule_go_on(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=8)
    train(config)
    first = write_config(TOKENFORMER, "first", train_iters=8, exit_interval=4, auto_resume=True)
    assert run_ranks(first).code == 75
    train(first, "no_load_optim=true", "exit_interval=null")
    for key in ("train/learning_rate", "consumed_tokens"):
        assert records(first.with_suffix(""), key) == records(config.with_suffix(""), key)
    whole, resumed = (records(path.with_suffix(""), "train/lm_loss") for path in (config, first))
    assert resumed[5] == whole[5], "the weights are those of the checkpoint"
    assert resumed[8] != whole[8], "the moments are not"


def test_changed_data_is_refused_unless_allowed(
    write_config: Callable[..., Path], dataset: Path, tmp_path: Path
) -> None:
    config = write_config(TOKENFORMER, train_iters=8, exit_interval=2, auto_resume=True)
    assert run_ranks(config).code == 75
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

    assert run_ranks(config, f"data_path={tmp_path / 'moved' / dataset.name}").code == 75
    refused = {
        f"data_path={tmp_path / 'other_token' / dataset.name}": "data_path (.bin): checkpoint",
        f"data_path={tmp_path / 'other_documents' / dataset.name}": "data_path (.idx): checkpoint",
        "seq_length=8": "seq_length: checkpoint 16, this run 8",
        "seed=8": "seed: checkpoint 7, this run 8",
        "split=80, 10, 10": "split: checkpoint 0.9, 0.05, 0.05, this run 0.8, 0.1, 0.1",
    }
    for change, message in refused.items():
        finished = run_ranks(config, change)
        assert finished.code == 1, change
        assert message in finished.output
        assert "`allow_changed_data: true`" in finished.output
    run = config.with_suffix("")
    for number, change in enumerate(refused):
        elsewhere = [f"load={run}", f"save={tmp_path / f'allowed{number}'}"]
        assert run_ranks(config, change, "allow_changed_data=true", *elsewhere).code == 75


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
    config = write_config(TOKENFORMER, tokenizer_type="HFTokenizer", exit_interval=2, auto_resume=True, train_iters=8)
    assert run_ranks(config, f"vocab_file={files[0]}").code == 75
    finished = run_ranks(config, f"vocab_file={files[1]}")
    assert finished.code == 1
    assert "vocab_file: checkpoint sha256" in finished.output and "`allow_changed_data: true`" in finished.output
    assert run_ranks(config, f"vocab_file={files[1]}", "allow_changed_data=true").code == 75
    finished = run_ranks(config, "tokenizer_type=CharLevelTokenizer")
    assert finished.code == 1
    assert "a vocabulary of 513 tokens padded to" in finished.output and "this run one of 512" in finished.output
