"""Runs that are distilled from a teacher, by the user's command: in all layouts, resumed, and with another teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.context import ParallelContext
from megatron.mpu.divergence import vocab_parallel_divergence
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.distributed import run_distributed
from tests.helpers.records import records
from tests.helpers.runs import fails_with, run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint
from tests.helpers.tiny_checkpoints import read_run, whole_model
from tests.helpers.training import train_on_ranks

CURVES = ("train/loss", "train/lm_loss", "train/distillation_loss", "train/grad_norm", "valid/lm_loss")
STUDENT: dict[str, Any] = TOKENFORMER | {
    "num_layers": 3,
    "hidden_size": 16,
    "rotary_pct": 0.5,
    "train_iters": 6,
    "eval_interval": 3,
    "eval_iters": 1,
}
"""Of another architecture, depth and width than the teacher, whose vocabulary is padded otherwise too."""


def student(teacher: Path, base: dict[str, Any] = STUDENT, **changes: Any) -> dict[str, Any]:
    distillation = {"teacher": str(teacher), "weight": 0.4, "temperature": 2.0}
    return base | {"distillation": distillation | changes}


def divergence_errors(divergence: str) -> dict[str, float]:
    """Differences of this rank's value and gradient from those of one rank."""
    context = ParallelContext.create(torch.distributed.get_world_size(), 1)
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(2, 2, 5, 24, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    results = []
    for where in (ParallelContext.single(), context):
        ours, theirs = logits.tensor_split(where.tensor_size, dim=-1)[where.tensor_rank].clone()
        ours.requires_grad_()
        # Two of the last rank's rows are tokens, the others padding.
        found = vocab_parallel_divergence(ours, theirs, divergence, 2.0, 20, where)  # type: ignore[arg-type]
        (found * weights).sum().backward()
        assert ours.grad is not None
        results.append((found.detach(), ours.grad))
    (whole, gradient), (split, own) = results
    share = gradient.tensor_split(context.tensor_size, dim=-1)[context.tensor_rank]
    return {"value": float((whole - split).abs().max()), "gradient": float((share - own).abs().max())}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_the_divergence_of_a_split_vocabulary_equals_the_whole_ones(divergence: str, ranks: int) -> None:
    for errors in run_distributed(divergence_errors, ranks, divergence):
        assert all(error < 1e-14 for error in errors.values()), errors


@pytest.fixture(scope="module")
def alone(pythia: Checkpoint, tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The folder of a distilled run on one rank, which others are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    data = {"data_path": str(dataset), "index_cache_dir": str(folder)}
    config = folder / "run.yml"
    config.write_text(yaml.safe_dump(student(pythia.path) | data | {"save": str(folder / "run")}))
    train(config)
    return folder / "run"


LAYOUTS = {
    "tensor": (2, {"model_parallel_size": 2}),
    "sequence": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pipe": (2, {"pipe_parallel_size": 2}),
    "data": (2, {"train_micro_batch_size_per_gpu": 2}),
    "all": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2}),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.full] * (name not in {"tensor", "all"})) for name in LAYOUTS]
)
def test_every_layout_learns_the_same(
    layout: str, alone: Path, pythia: Checkpoint, write_config: Callable[..., Path]
) -> None:
    ranks, changes = LAYOUTS[layout]
    config = write_config(student(pythia.path), **changes)
    train(config, ranks=ranks)
    for key in CURVES:
        theirs = records(alone, key)
        assert theirs
        assert records(config.with_suffix(""), key) == pytest.approx(theirs, rel=1e-5), key


def test_the_first_step_equals_plain_torch_in_float64(pythia: Checkpoint, write_config: Callable[..., Path]) -> None:
    """Loss and norm of the gradient, over two micro batches, of which some positions do not count."""
    config = write_config(student(pythia.path), train_iters=1, eval_iters=0, eod_mask_loss=True)
    (rank,) = train_on_ranks(config, 1)
    run = read_run(config)
    pupil = build_local(run.model, VocabSize(512, 512), seed=None)
    pupil.load_state_dict(rank.first_weights)
    pupil.double()
    master = whole_model(pythia.config).double()
    tokens = torch.from_numpy(np.concatenate(rank.rows))
    ours, theirs = pupil(tokens[:, :-1]), master(tokens[:, :-1]).detach()[..., :512]
    counted = tokens[:, :-1] != 0
    assert not counted.all()
    language = F.cross_entropy(ours[counted], tokens[:, 1:][counted])
    log_q, p = (ours[counted] / 2).log_softmax(-1), (theirs[counted] / 2).softmax(-1)
    loss = 0.6 * language + 0.4 * 4.0 * F.kl_div(log_q, p, reduction="batchmean")
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in pupil.parameters()])
    assert rank.curve[0] == pytest.approx((loss.item(), norm.item()), rel=1e-5)


def test_the_terms_are_those_of_the_loss(alone: Path, pythia: Checkpoint) -> None:
    whole, language, divergence = (records(alone, f"train/{key}") for key in ("loss", "lm_loss", "distillation_loss"))
    for step in range(1, 7):
        assert whole[step] == pytest.approx(0.6 * language[step] + 0.4 * divergence[step], rel=1e-6)
    teacher = json.loads((alone / "run.json").read_text())["teacher"]
    assert teacher["path"] == str(pythia.path.resolve()) and teacher["kind"] == "checkpoint"
    assert (teacher["iteration"], teacher["num_layers"], teacher["hidden_size"]) == (7, 2, 32)
    assert json.loads((alone / "global_step6" / "state.json").read_text())["teacher"] == teacher["sha256"]


def test_a_teacher_agrees_with_its_own_copy_and_evaluation_knows_no_teacher(
    pythia_run: Path, write_config: Callable[..., Path]
) -> None:
    """The student is the teacher at first: their distributions agree at every position, in two stages as well."""
    steps = {"train_iters": 1, "finetune": True, "load": str(pythia_run), "iteration": 20}
    plain = write_config(PYTHIA | steps, "plain")
    train(plain)
    taught = write_config(student(pythia_run, PYTHIA | steps, iteration=20), "taught", pipe_parallel_size=2)
    train(taught, ranks=2)
    found, without = taught.with_suffix(""), plain.with_suffix("")
    assert records(found, "train/distillation_loss")[1] == pytest.approx(0.0, abs=1e-6)
    assert records(found, "train/lm_loss") == pytest.approx(records(without, "train/lm_loss"), rel=1e-6)
    gradient = 0.6 * records(without, "train/grad_norm")[1]
    assert records(found, "train/grad_norm")[1] == pytest.approx(gradient, rel=1e-4)
    # One clipped step of Adam does not depend on the size of its gradient.
    for key in ("valid/lm_loss", "test/lm_loss"):
        assert records(found, key) == pytest.approx(records(without, key), rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_and_keeps_its_teacher(
    pythia: Checkpoint, tokenformer: Checkpoint, write_config: Callable[..., Path]
) -> None:
    layout = {"pipe_parallel_size": 2, "precision": "bfloat16", "hidden_dropout": 0.1}
    whole = write_config(student(pythia.path), "whole", **layout)
    train(whole, ranks=2)
    halves = write_config(student(pythia.path), "halves", **layout, auto_resume=True, exit_interval=3)
    assert run_ranks(halves, ranks=2).code == 75
    folder = halves.with_suffix("")
    error = fails_with(halves, f"distillation.teacher={tokenformer.path}", "pipe_parallel_size=1")
    assert f"{folder}/global_step3 was distilled from another one (SHA-256 " in error
    assert "distillation.allow_changed_teacher: true" in error
    assert "names none. Restore its section `distillation`" in fails_with(
        halves, "distillation=null", "pipe_parallel_size=1"
    )
    assert run_ranks(halves, ranks=2).code == 0
    for key in CURVES:
        assert records(folder, key) == records(whole.with_suffix(""), key), key
    assert_same_checkpoint(folder / "global_step6", whole.with_suffix("") / "global_step6")
    train(halves, f"distillation.teacher={tokenformer.path}", "distillation.allow_changed_teacher=true",
          "train_iters=7", ranks=2)  # fmt: skip
    assert json.loads((folder / "run.json").read_text())["teacher"]["architecture"] == "tokenformer"


@pytest.mark.full
@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_a_hugging_face_folder_teaches_what_its_checkpoint_does(
    divergence: str, tokenformer: Checkpoint, exported: Path, write_config: Callable[..., Path]
) -> None:
    curves = []
    for name, teacher in (("ours", tokenformer.path), ("theirs", exported)):
        config = write_config(student(teacher, divergence=divergence), name)
        train(config)
        curves.append({key: records(config.with_suffix(""), key) for key in CURVES})
    assert curves[0] == curves[1]
    assert json.loads((config.with_suffix("") / "run.json").read_text())["teacher"]["kind"] == "huggingface"


@pytest.mark.full
def test_a_run_that_grows_keeps_its_teacher(pythia: Checkpoint, write_config: Callable[..., Path]) -> None:
    grow = {"operator": "zero_key", "at_step": 3, "factor": 2}
    config = write_config(student(pythia.path) | {"grow": grow}, pipe_parallel_size=2)
    train(config, ranks=2)
    assert list(records(config.with_suffix(""), "train/distillation_loss")) == [1, 2, 3, 4, 5, 6]
    state = json.loads((config.with_suffix("") / "global_step6" / "state.json").read_text())
    assert len(state["growth"]) == 1
    assert state["teacher"] == json.loads((config.with_suffix("") / "run.json").read_text())["teacher"]["sha256"]
