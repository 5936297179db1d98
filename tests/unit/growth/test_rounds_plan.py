"""Plans of Inheritune: the rounds that follow from them, their table, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.model_size import count_parameters, training_flops
from megatron.errors import CheckpointError, ConfigError
from megatron.growth.inheriting.rounds_plan import RoundsPlan, load_rounds
from tests.helpers.configs import TOKENFORMER
from tests.helpers.forkserver import ROOT
from tests.helpers.tiny_checkpoints import make_checkpoint, write_yaml
from tools import run_stages

KEYS: dict[str, Any] = TOKENFORMER | {
    "make_vocab_size_divisible_by": 100, "train_batch_size": 8, "lr_decay_iters": None, "ffn_scale_base": 16,
    "train_micro_batch_size_per_gpu": None, "gradient_accumulation_steps": None, "data_path": "data/text",
}  # fmt: skip
ROUNDS: dict[str, Any] = {"layers": 2, "layers_per_round": 2, "steps": 100}


class Folder:
    """Plans in a folder, and a reference of six layers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reference = path / "run"

    def train_reference(self, **changes: Any) -> None:
        make_checkpoint(write_yaml(self.path, KEYS | {"num_layers": 6} | changes))

    def write(self, base: dict[str, Any] | None = None, **changes: Any) -> Path:
        (self.path / "base.yml").write_text(yaml.safe_dump(KEYS | (base or {})))
        rounds = {"reference": str(self.reference)} | ROUNDS | changes
        rounds = {key: value for key, value in rounds.items() if value is not None}
        plan = self.path / "plan.yml"
        content = {"config_files": ["base.yml"], "folder": str(self.path / "runs"), "inheritune": rounds}
        plan.write_text(yaml.safe_dump(content, sort_keys=False))
        return plan

    def load(self, *overrides: str, base: dict[str, Any] | None = None, **changes: Any) -> RoundsPlan:
        return load_rounds(self.write(base, **changes), overrides, run_stages.hf_model)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def layers_of(plan: RoundsPlan) -> list[int]:
    return [stage.sizes.num_layers for stage in plan.rounds]


def test_rounds_follow_from_layers_and_budgets(folder: Folder) -> None:
    folder.train_reference()
    assert layers_of(folder.load()) == [2, 4, 6]
    assert layers_of(folder.load(layers_per_round=3)) == [2, 5, 6], "the last round appends what is left"
    assert layers_of(folder.load(max_layers=4)) == [2, 4]
    assert layers_of(folder.load(layers=6)) == [6]
    tokens = 100 * 8 * 16
    assert layers_of(folder.load(max_tokens=2 * tokens)) == [2, 4]
    assert layers_of(folder.load(max_tokens=3 * tokens - 1)) == [2, 4]
    assert [stage.last_step for stage in folder.load(steps=None, tokens=tokens - 1).rounds] == [100, 200, 300]


def test_a_round_is_a_run_with_a_schedule_of_its_own(folder: Folder) -> None:
    folder.train_reference()
    grow = {"moments": "reset_new", "learning_rate": "rewarm_new", "rewarm_iters": 5}
    plan = folder.load(inherit={"sublayers": ["attention", "norms"]}, grow=grow, keys={"min_lr": 2e-5}, margin=0.1)
    first, second, third = (stage.loaded.run for stage in plan.rounds)
    assert (first.checkpoint.load, first.checkpoint.finetune) == (str(folder.reference), True)
    assert first.inherit is not None and first.inherit.sublayers == ["attention", "norms"] and first.grow is None
    for run, before in ((second, "2_layers"), (third, "4_layers")):
        assert run.inherit is None and run.grow is not None
        assert (run.grow.operator, run.grow.reference) == ("append", str(folder.reference))
        assert (run.grow.schedule, run.grow.moments, run.grow.rewarm_iters) == ("restart", "reset_new", 5)
        assert (run.checkpoint.load, run.checkpoint.finetune) == (str(folder.path / "runs" / before), False)
    for run in (first, second, third):
        schedule = run.training.lr_schedule
        assert (run.training.train_iters, schedule.decay_iters, schedule.min_lr) == (300, 100, 2e-5)
    assert plan.margin == 0.1 and plan.decisions_file == folder.path / "runs" / "decisions.json"
    shared = folder.load(grow={"schedule": "continue"}).rounds[2].loaded.run
    assert shared.grow is not None and shared.grow.schedule == "continue"
    assert shared.training.lr_schedule.decay_iters is None, "one schedule for all rounds"
    assert folder.load(keys={"lr_decay_iters": 80}).rounds[0].loaded.run.training.lr_schedule.decay_iters == 80


def test_the_table_shows_every_round_and_what_ends_the_loop(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.train_reference()
    plan = folder.load()
    assert run_stages.main([str(plan.file), "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    models = [stage.loaded.run.model for stage in plan.rounds]
    costs = [100 * 8 * 16 * training_flops(model, 600, 16) for model in models]
    for number, (model, line) in enumerate(zip(models, lines[1:4], strict=True)):
        assert line.startswith(f"{model.num_layers}_layers ")
        assert f" {count_parameters(model, 600):,} " in line
        assert f" {costs[number]:.2e} " in line and f" {sum(costs[: number + 1]):.2e} " in line
        assert line.endswith("to do")
    assert f"{folder.reference}: layers 0 to 1" in lines[1] and "2_layers by append" in lines[2]
    count = count_parameters(models[0].model_copy(update={"num_layers": 6}), 600)
    assert f"reference: {folder.reference}, 6 layers, {count:,} parameters" in lines
    assert "the first 8 validation samples" in lines[-1]


def test_a_reference_that_is_not_there_yet_can_be_planned_for(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = folder.write(max_layers=4)
    assert run_stages.main([str(plan), "--check"]) == 0
    assert f"reference: {folder.reference}, which is not there yet" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"holds no checkpoint. Train it or copy it there first"):
        run_stages.main([str(plan), "num_gpus=1"])
    assert not (folder.path / "runs").exists()
    with pytest.raises(ConfigError, match=r"plan.yml: missing key max_layers: missing, and .* holds no checkpoint"):
        folder.load()


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"max_layers": 8}, {}, r"plan.yml:\d+ max_layers: .*has 6 layers; use at most as many"),
    ({"layers": 7}, {}, r"plan.yml:\d+ layers: 7 is above the layers of .*: 6"),
    ({"layers": 5, "max_layers": 4}, {}, r"layers: 5 is above max_layers: 4"),
    ({"layers": 0}, {}, r"layers: 0: expected a whole number above 0"),
    ({"layers_per_round": None}, {}, r"layers_per_round: expected a number of layers"),
    ({"steps": None}, {}, "expected either tokens or steps"),
    ({"max_tokens": 100}, {}, r"max_tokens: a round reads 12,800 tokens, so that not one fits"),
    ({"margin": -1}, {}, "margin: expected a number of at least 0"),
    ({"layer": 2}, {}, "layer: no key of inheritune; did you mean layers"),
    ({"inherit": {"layers": "last"}}, {}, r"inherit.layers: last: follows from the plan"),
    ({"grow": {"operator": "stack"}}, {}, r"grow.operator: stack: follows from the plan"),
    ({"keys": {"num_layers": 3}}, {}, r"num_layers: 3: follows from the plan"),
    ({"keys": {"train_iters": 3}}, {}, r"train_iters: 3: follows from the stage's place"),
    ({}, {"hidden_size": 64}, r"plan.yml:\d+ reference: .*hidden_size: reference 32, configuration 64"),
    ({}, {"ffn_scale_base": 48}, r"param_tokens.ffn_scale_base: reference 16, configuration 48"),
    (
        {},
        {"make_vocab_size_divisible_by": 64, "padded_vocab_size": 640},
        r"its embedding has 600 rows, and the rounds' 640",
    ),
    ({}, {"eval_iters": 0}, r"base.yml:\d+ eval_iters: 0: losses are compared on the first eval_iters batches"),
    ({}, {"split": "1,0,0"}, r"base.yml:\d+ split: 1,0,0: losses are compared on validation data"),
]


@pytest.mark.parametrize(("changes", "base", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_plans_that_are_refused(changes: dict[str, Any], base: dict[str, Any], message: str, folder: Folder) -> None:
    folder.train_reference()
    with pytest.raises(ConfigError, match=message):
        folder.load(base=base, **changes)
    assert not (folder.path / "runs").exists()


def test_an_unfinished_reference_is_refused(folder: Folder) -> None:
    folder.train_reference()
    (folder.reference / "global_step7" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        folder.load()


def test_the_demo_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """It needs nothing but what `make demo` leaves."""
    plan = ROOT / "configs" / "inheritune" / "demo.yml"
    words = [str(plan), "--check", "padded_vocab_size=2048", "--folder", "runs/nowhere"]
    assert run_stages.main(words) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["2_layers", "3_layers", "4_layers"]
    assert "demo/run: layers 0 to 1" in shown and "the first 320 validation samples" in shown
    assert load_rounds(plan, [], run_stages.hf_model).rounds[1].loaded.run.training.lr_schedule.decay_iters == 200


ROUNDS_OF_THE_PAPER = {"medium": [12, 14, 16], "large": [18, 20, 22], "xl": [24, 26, 28]}
"""Layers of GPT-2's rounds; the paper reports the first for large and XL, and all for medium."""


@pytest.mark.parametrize("size", ROUNDS_OF_THE_PAPER)
def test_the_papers_rounds(size: str) -> None:
    plan = load_rounds(ROOT / "configs" / "inheritune" / f"rounds_gpt2_{size}.yml", [], run_stages.hf_model)
    assert layers_of(plan) == ROUNDS_OF_THE_PAPER[size]
    tokens = {"medium": 384 * 1024, "large": 128 * 1024, "xl": 128 * 1024}[size]
    for number, stage in enumerate(plan.rounds):
        schedule, model = stage.loaded.run.training.lr_schedule, stage.loaded.run.model
        assert (stage.first_step, stage.last_step) == (number * 100_000, (number + 1) * 100_000)
        assert stage.tokens_per_step == tokens
        assert (schedule.decay_iters, schedule.warmup, schedule.min_lr) == (100_000, 0.02, 1e-5)
        assert model.scale_attn_by_inverse_layer_idx and not model.use_bias_in_mlp
