"""Twenty steps equal ten, a resume, and ten more, bit for bit; and what else a run starts from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.configs import TOKENFORMER
from tests.helpers.covers import covered, pairwise_cover
from tests.helpers.layout_runs import BASES, PAIRWISE, Case, LayoutRuns
from tests.helpers.records import records
from tests.helpers.runs import fails_with, run_ranks, train
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


WAYS = ["fp32", "bfloat16"], [1, 2]


@pytest.mark.parametrize(
    ("model", "precision", "ranks"),
    covered(list(product(BASES, *WAYS)), pairwise_cover(list(product(PAIRWISE, *WAYS)), list)),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    model: str, precision: str, ranks: int, write_config: Callable[..., Path]
) -> None:
    """Through validations, over the end of an epoch (six steps are one), with dropout and loader workers."""
    changes = {
        "train_micro_batch_size_per_gpu": 4 // ranks,
        "precision": precision,
        "num_workers": 2,
        "eval_interval": 5,
        "split": "5, 90, 5",
        "hidden_dropout": 0.0 if model == "tokenformer" else 0.1,
        "attention_dropout": 0.0 if model == "tokenformer" else 0.1,
    }
    base = BASES[model]
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


BATCH_OF_16 = TOKENFORMER | {
    "train_batch_size": 16,
    "gradient_accumulation_steps": None,
    "log_batch_hashes": True,
    "train_iters": 6,
    "split": "5, 90, 5",
}


@pytest.fixture(scope="module")
def whole_batches(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run of BATCH_OF_16 on one rank, which nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(BATCH_OF_16 | paths | {"train_micro_batch_size_per_gpu": 8}))
    train(config)
    return folder / "run"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, 4), (1, 2), id="micro batch"),
        pytest.param((1, 8), (2, 2), id="1 to 2"),
        pytest.param((2, 2), (1, 8), id="2 to 1", marks=pytest.mark.full),
    ],
)
def test_another_layout_of_the_batch_reads_the_same_samples(
    before: tuple[int, int], after: tuple[int, int], whole_batches: Path, write_config: Callable[..., Path]
) -> None:
    """(ranks, micro batch) before and after a resume, of 16 samples a step."""
    config = write_config(BATCH_OF_16, auto_resume=True, exit_interval=3)
    assert run_ranks(config, f"train_micro_batch_size_per_gpu={before[1]}", ranks=before[0]).code == 75
    train(config, f"train_micro_batch_size_per_gpu={after[1]}", ranks=after[0])
    ours, theirs = ((run / "batch_hashes.jsonl").read_text() for run in (config.with_suffix(""), whole_batches))
    assert ours == theirs
    assert len(ours.splitlines()) == 6
    losses = [records(run, "train/lm_loss") for run in (whole_batches, config.with_suffix(""))]
    assert losses[1][4] == pytest.approx(losses[0][4], abs=1e-6)


def test_a_refused_start_ends_with_one_line_and_changes_nothing(tokenformer_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tokenformer_run.rglob("*")}
    error = fails_with(tokenformer_run.with_suffix(".yml"))
    assert "already holds checkpoints of another run. Set `auto_resume: true`" in error
    assert before == {path: path.stat().st_mtime_ns for path in tokenformer_run.rglob("*")}


def test_the_schedule_that_was_chosen_is_followed(tokenformer_run: Path, write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=6, load=str(tokenformer_run), iteration=4)
    train(config, "min_lr=9e-4", "override_lr_scheduler=true")
    assert records(config.with_suffix(""), "train/learning_rate")[6] > 9e-4
    train(config, "min_lr=5e-4", "use_checkpoint_lr_scheduler=true", f"save={config.with_name('followed')}")
    rates = records(config.with_name("followed"), "train/learning_rate")
    assert rates[6] == pytest.approx(1e-4 + 4.5e-4 * (1 + math.cos(math.pi * 2 / 27)))


@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_changed_hyperparameters_take_effect(precision: str, layout_runs: LayoutRuns) -> None:
    case = Case("tokenformer", (1, 1, 1), tied=True)
    changes = {} if precision == "fp32" else {"precision": precision}
    run = layout_runs.trained(case, **changes)
    config = layout_runs.config(f"changed-{precision}", case.keys() | changes | {"load": str(run.checkpoint(3))})
    betas = "optimizer.params.betas=[0.5, 0.6]"
    train(config, "train_iters=4", betas, "optimizer.params.eps=1e-5", "weight_decay=0.3", "gradient_clipping=0.25")
    [file] = (config.with_suffix("") / "global_step4").glob("*optim_states.pt")
    # A file of the test's own making; it holds DeepSpeed's LossScaler.
    saved = torch.load(file, weights_only=False)["optimizer_state_dict"]
    groups = saved["base_optimizer_state"]["param_groups"]
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.6), 1e-5)}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert saved["clip_grad"] == 0.25


def test_going_back_makes_a_branch_that_is_gone_on_from(
    tokenformer_run: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(TOKENFORMER, train_iters=6, checkpoint_factor=2)
    run = config.with_suffix("")
    for step in (2, 4, 6):
        shutil.copytree(tokenformer_run / f"global_step{step}", run / f"global_step{step}")
    (run / "latest").write_text("global_step6\n")
    back = run_ranks(config, f"load={run}", "iteration=2", "exit_interval=3")
    assert back.code == 75
    assert (run / "latest").read_text() == "global_step3\n"
    train(config, "auto_resume=true")
    assert "`latest`" not in back.output
    assert_same_checkpoint(run / "global_step6", tokenformer_run / "global_step6")
    assert (run / "latest").read_text() == "global_step6\n"


def test_finetuning_takes_the_weights_only(tokenformer_run: Path, write_config: Callable[..., Path]) -> None:
    tuned = write_config(TOKENFORMER, "tuned", train_iters=2, extra_save_iters=[0], train_micro_batch_size_per_gpu=2)
    train(tuned, f"load={tokenformer_run}", "iteration=3", "finetune=true", ranks=2)
    file = "layer_01-model_00-model_states.pt"
    start = torch.load(tuned.with_suffix("") / "global_step0" / file, weights_only=True)
    trained = torch.load(tokenformer_run / "global_step3" / file, weights_only=True)
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert list(records(tuned.with_suffix(""), "train/lm_loss")) == [1, 2]


def test_without_the_optimizers_state_weights_place_and_schedule_go_on(
    tokenformer_run: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(TOKENFORMER, train_iters=8)
    train(config, f"load={tokenformer_run}", "iteration=4", "no_load_optim=true")
    resumed = config.with_suffix("")
    for key in ("train/learning_rate", "consumed_tokens"):
        whole = records(tokenformer_run, key)
        assert records(resumed, key) == {step: whole[step] for step in range(5, 9)}
    ours, theirs = (records(run, "train/lm_loss") for run in (resumed, tokenformer_run))
    assert ours[5] == theirs[5], "the weights are those of the checkpoint"
    assert ours[8] != theirs[8], "the moments are not"


def test_a_run_goes_on_with_changed_data_that_it_allows(
    tokenformer_run: Path, write_config: Callable[..., Path]
) -> None:
    config = write_config(TOKENFORMER, train_iters=6, load=str(tokenformer_run), iteration=4, seed=8)
    error = fails_with(config)
    assert "seed: checkpoint 7, this run 8" in error and "`allow_changed_data: true`" in error
    train(config, "allow_changed_data=true")
    ours, theirs = (records(run, "train/lm_loss") for run in (config.with_suffix(""), tokenformer_run))
    assert list(ours) == [5, 6]
    assert ours[5] != theirs[5]
