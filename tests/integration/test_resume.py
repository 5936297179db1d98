"""Twenty steps equal ten, a resume, and ten more, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PYTHIA, TOKENFORMER, records, run_command, train


def tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dictionaries and lists, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    files = sorted(file.name for file in ours.glob("*.pt"))
    assert files == sorted(file.name for file in theirs.glob("*.pt"))
    compared = 0
    for file in files:
        # Files of this test's own making; the optimizer's holds DeepSpeed's LossScaler.
        left = tensors(torch.load(ours / file, weights_only=False))
        right = tensors(torch.load(theirs / file, weights_only=False))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), (file, name)
            compared += tensor.numel()
    assert compared > 10_000


@pytest.mark.parametrize("base", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
@pytest.mark.parametrize("precision", ["fp32", "bfloat16"])
def test_a_resumed_run_is_the_uninterrupted_one(
    base: dict[str, Any], precision: str, write_config: Callable[..., Path]
) -> None:
    changes = {
        "precision": precision,
        "num_workers": 2,
        "eval_interval": 5,
        "hidden_dropout": 0.1 if base is PYTHIA else 0.0,
        "attention_dropout": 0.1 if base is PYTHIA else 0.0,
    }
    whole = write_config(base, "whole", **changes)
    train(whole)
    halves = write_config(base, "halves", **changes, checkpoint_factor=10)
    train(halves)
    for leftover in (halves.with_suffix("") / "global_step20").iterdir():
        leftover.unlink()
    (halves.with_suffix("") / "global_step20").rmdir()
    (halves.with_suffix("") / "latest").write_text("global_step10")
    train(halves, "auto_resume=true")

    whole_run, resumed_run = whole.with_suffix(""), halves.with_suffix("")
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "valid/lm_loss"):
        assert records(whole_run, key) == records(resumed_run, key)
    assert len(records(resumed_run, "train/lm_loss")) == 20
    assert_same_checkpoint(whole_run / "global_step20", resumed_run / "global_step20")


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


def test_a_fresh_run_does_not_write_among_the_checkpoints_of_another(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=1)
    train(config)
    finished = run_command(["deepy.py", "train.py", str(config)])
    assert finished.returncode == 1
    assert "already holds checkpoints of another run. Set `auto_resume: true`" in finished.stderr


def test_another_schedule_is_refused_unless_chosen(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=4)
    train(config)
    run = config.with_suffix("")
    resume = ["deepy.py", "train.py", str(config), "train_iters=6", "auto_resume=true", "min_lr=5e-4"]
    finished = run_command(resume)
    assert finished.returncode == 1
    assert "min_lr: checkpoint 0.0001, configuration 0.0005" in finished.stderr
    train(config, *resume[3:5], "min_lr=9e-4", "override_lr_scheduler=true")
    assert records(run, "train/learning_rate")[6] > 9e-4
    (run / "latest").write_text("global_step4")
    train(config, *resume[3:], "use_checkpoint_lr_scheduler=true")
    assert records(run, "train/learning_rate")[6] == pytest.approx(1e-4 + 4.5e-4 * (1 + math.cos(math.pi * 2 / 27)))


def test_finetuning_takes_the_weights_only(write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, train_iters=3)
    train(config)
    tuned = write_config(TOKENFORMER, "tuned", train_iters=2, extra_save_iters=[0])
    train(tuned, f"load={config.with_suffix('')}", "finetune=true")
    file = "layer_01-model_00-model_states.pt"
    start = torch.load(tuned.with_suffix("") / "global_step0" / file, weights_only=True)
    trained = torch.load(config.with_suffix("") / "global_step3" / file, weights_only=True)
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert list(records(tuned.with_suffix(""), "train/lm_loss")) == [1, 2]
