"""Plans of Inheritune: rounds inherit, train, are measured, and append; killed at any moment, they end the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.growth.inheriting.rounds_plan import load_rounds
from tests.helpers.configs import PYTHIA, TOKENFORMER, write_dataset
from tests.helpers.faults import at_step, kill_all_ranks
from tests.helpers.runs import run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint
from tests.helpers.tiny_checkpoints import export
from tools import run_stages
from tools.inheriting_loop import InheritingLoop

STEPS = 4
BASE: dict[str, Any] = TOKENFORMER | {
    "train_batch_size": 8, "lr_decay_iters": None, "eval_interval": 100, "num_gpus": 1, "extra_save_iters": [0],
    "ffn_scale_base": 16, "checkpoint_factor": 3, "gradient_accumulation_steps": None,
}  # fmt: skip
# At a learning rate at which a few steps change little, less than the whole reference stays above it.
ROUNDS: dict[str, Any] = {
    "layers": 1, "layers_per_round": 1, "steps": STEPS, "max_layers": 2,
    "keys": {"optimizer": {"params": {"lr": 1e-5}}, "min_lr": 0.0},
}  # fmt: skip


def kill_at(step: int) -> None:
    at_step(step, kill_all_ranks)


class ForkedCommands:
    """Runs the commands of a loop in forks, which spend no time on imports.

    The `killed`-th one is killed when it begins the step of that number.
    """

    stopped = False

    def __init__(self, killed: int | None = None, step: int = 0) -> None:
        self.killed = killed
        self.step = step
        self.calls: list[str] = []

    def __call__(self, script: str, *words: str) -> int:
        if script != "deepy.py":
            from tools.ckpts import convert_hf_to_neox

            self.calls.append("import")
            return convert_hf_to_neox.main(words)
        name = words[0].removesuffix(".py")
        module = "tools.validate" if name == "validate" else name
        self.calls.append(f"{name} {Path(words[1]).stem}")
        before = (kill_at, (self.step,)) if len(self.calls) == self.killed else (None, ())
        return run_ranks(Path(words[1]), *words[2:], script=module, before=before[0], arguments=before[1]).code


class UntilValidated(ForkedCommands):
    """Ends where a round is to be measured, as if it was killed."""

    def __init__(self, stage: str, reference: Path) -> None:
        super().__init__()
        self.stage = stage
        self.reference = str(reference)

    def __call__(self, script: str, *words: str) -> int:
        is_reference = self.reference in words[-2]
        if words[0] == "validate.py" and Path(words[1]).stem == self.stage and not is_reference:
            return 137
        return super().__call__(script, *words)


class Loop:
    """A plan, and the reference of four layers that it names."""

    def __init__(self, path: Path, reference: Path, data: dict[str, Any], **changes: Any) -> None:
        self.path = path
        self.runs = path / "runs"
        path.mkdir(exist_ok=True)
        (path / "base.yml").write_text(yaml.safe_dump(BASE | data))
        rounds = ROUNDS | {"reference": str(reference)} | changes
        content = {"config_files": ["base.yml"], "folder": str(self.runs), "inheritune": rounds}
        self.file = path / "plan.yml"
        self.file.write_text(yaml.safe_dump(content, sort_keys=False))

    def run(self, command: Callable[..., int]) -> int:
        plan = load_rounds(self.file, [], run_stages.hf_model)
        run_stages.require_reference(plan)
        loop = InheritingLoop(
            plan, command, lambda stage: run_stages.train_stages([run_stages.StagePlace.of(stage)], command)
        )
        return loop.run()

    @property
    def decisions(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.runs / "decisions.json").read_text())
        return found

    def checkpoint(self, layers: int, step: int) -> Path:
        return self.runs / f"{layers}_layers" / f"global_step{step}"

    def rows(self, layers: int) -> list[dict[str, Any]]:
        lines = (self.runs / f"{layers}_layers" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data")
    return {"data_path": str(write_dataset(path / "text")), "index_cache_dir": str(path / "index")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> Path:
    """Trained for so long that no round of a few steps meets it."""
    path = tmp_path_factory.mktemp("reference")
    keys = BASE | data | {"num_layers": 4, "train_iters": 60, "save": str(path / "run")}
    (path / "reference.yml").write_text(yaml.safe_dump(keys))
    assert run_ranks(path / "reference.yml").code == 0
    return path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, reference: Path, data: dict[str, Any]) -> Loop:
    loop = Loop(tmp_path_factory.mktemp("whole"), reference, data)
    command = ForkedCommands()
    assert loop.run(command) == 0
    rounds = [f"{script} {layers}_layers" for layers in (1, 2) for script in ("train", "validate")]
    assert command.calls == ["validate 1_layers", *rounds]
    return loop


def test_rounds_append_the_references_next_layers_until_the_budget_ends(whole: Loop, reference: Path) -> None:
    decisions = whole.decisions
    assert [found["decision"] for found in decisions["rounds"]] == [
        "append the reference's layers 1", "the budget ends"
    ]  # fmt: skip
    assert "ends with 2 layers" in decisions["outcome"]
    assert all(found["loss"] > decisions["reference"]["loss"] for found in decisions["rounds"])
    assert len({found["data"] for found in (decisions["reference"], *decisions["rounds"])}) == 1
    theirs = read_weights(read_checkpoint(reference / "global_step60"))
    first = read_weights(read_checkpoint(whole.checkpoint(1, 0)))
    assert all(torch.equal(first[name], theirs[name]) for name in first)
    # The larger model takes the place of the smaller in its own folder before its first step.
    state = read_checkpoint(whole.checkpoint(2, 2 * STEPS)).state
    assert [record.new_layers for record in state.growth] == [(1,)]
    assert state.consumed_train_samples == 2 * STEPS * 8, "data goes on"
    rates = {layers: [row["train/learning_rate"] for row in whole.rows(layers) if "train/lm_loss" in row]
             for layers in (1, 2)}  # fmt: skip
    assert rates[1] == rates[2], "each round has a schedule of its own"
    steps = [row["iteration"] for layers in (1, 2) for row in whole.rows(layers) if "train/lm_loss" in row]
    assert steps == list(range(1, 2 * STEPS + 1))


def test_a_loop_that_is_done_says_so_and_does_nothing(whole: Loop, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole.runs / "decisions.json").read_bytes()
    command = ForkedCommands()
    assert whole.run(command) == 0
    assert command.calls == [] and (whole.runs / "decisions.json").read_bytes() == before
    assert "The budget of the plan ends with 2 layers" in capsys.readouterr().out
    assert run_stages.main([str(whole.file), "--check"]) == 0
    assert capsys.readouterr().out.count(" done\n") == 2


def assert_ends_like(whole: Loop, loop: Loop) -> None:
    assert loop.run(ForkedCommands()) == 0
    for layers, step in ((1, STEPS), (2, 2 * STEPS)):
        assert_same_checkpoint(loop.checkpoint(layers, step), whole.checkpoint(layers, step))
    ours, theirs = loop.decisions, whole.decisions
    for one, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        same = ("round", "layers", "iteration", "loss", "data", "decision", "above_reference")
        assert [one[key] for key in same] == [other[key] for key in same]
    assert (ours["outcome"], ours["reference"]) == (theirs["outcome"], theirs["reference"])


@pytest.mark.parametrize(
    ("killed", "step"), [(4, 4), *[pytest.param(n, s, marks=pytest.mark.full) for n, s in ((2, 1), (2, 4), (4, 1))]]
)
def test_killed_in_a_stage_it_ends_bitwise_like_an_uninterrupted_one(
    killed: int, step: int, whole: Loop, reference: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    loop = Loop(tmp_path / "loop", reference, data)
    assert loop.run(ForkedCommands(killed, step)) == -9
    assert_ends_like(whole, loop)


@pytest.mark.full
@pytest.mark.parametrize("layers", [1, 2])
def test_killed_between_a_round_and_its_decision(
    layers: int, whole: Loop, reference: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    """Measured or not, decided or not: what is missing is made again."""
    loop = Loop(tmp_path / "loop", reference, data)
    assert loop.run(UntilValidated(f"{layers}_layers", reference)) == 137
    (loop.runs / "decisions.json").unlink(missing_ok=True)
    assert_ends_like(whole, loop)


def test_the_loop_ends_with_the_round_that_meets_the_reference(
    reference: Path, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a margin that any loss meets; the rounds after it are not trained."""
    loop = Loop(tmp_path, reference, data, margin=100.0, steps=1)
    command = ForkedCommands()
    assert loop.run(command) == 0
    assert command.calls == ["validate 1_layers", "train 1_layers", "validate 1_layers"]
    assert loop.decisions["outcome"] == "The reference is met with 1 layer."
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"The reference is met with 1 layer. (see {loop.runs / 'decisions.json'})"


@pytest.mark.full
def test_a_hugging_face_folder_is_imported_once(reference: Path, data: dict[str, Any], tmp_path: Path) -> None:
    hf = export(read_checkpoint(reference / "global_step60"), tmp_path / "hf")
    loop = Loop(tmp_path / "loop", hf, data, margin=100.0, steps=1, layers=2)
    command = ForkedCommands()
    assert loop.run(command) == 0
    assert command.calls[:2] == ["import", "validate 2_layers"]
    theirs = read_weights(read_checkpoint(reference / "global_step60"))
    ours = read_weights(read_checkpoint(loop.checkpoint(2, 0)))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = ForkedCommands()
    assert loop.run(again) == 0 and again.calls == []


@pytest.mark.full
def test_samples_that_change_are_measured_again(reference: Path, data: dict[str, Any], tmp_path: Path) -> None:
    """A loop whose validation is made longer does not compare a new loss with an old one."""
    loop = Loop(tmp_path, reference, data, margin=100.0, steps=1)
    assert loop.run(ForkedCommands()) == 0
    before = loop.decisions
    base = tmp_path / "base.yml"
    base.write_text(yaml.safe_dump(yaml.safe_load(base.read_text()) | {"eval_iters": 2}))
    shutil.rmtree(loop.runs / "1_layers")
    command = ForkedCommands()
    assert loop.run(command) == 0
    after = loop.decisions
    assert command.calls == ["train 1_layers", *["validate 1_layers"] * 3]
    assert (before["reference"]["samples"], after["reference"]["samples"]) == (8, 16)
    assert after["reference"]["data"] == after["rounds"][0]["data"] != before["reference"]["data"]
    base.write_text(yaml.safe_dump(yaml.safe_load(base.read_text()) | {"eval_iters": 3}))
    (loop.runs / "validation" / "reference.json").unlink()
    command = ForkedCommands()
    assert loop.run(command) == 0
    last = loop.decisions
    assert last["reference"]["samples"] == last["rounds"][0]["samples"] == 24
    assert command.calls == ["validate 1_layers"] * 3


@pytest.mark.full
def test_the_command_runs_a_plan_of_another_architecture(data: dict[str, Any], tmp_path: Path) -> None:
    """As a user types it, processes and all."""
    from tests.helpers.commands import run_command

    keys = BASE | PYTHIA | data | {"num_layers": 3, "lr_decay_iters": None, "train_iters": 20, "num_gpus": 1}
    keys = {key: value for key, value in keys.items() if not key.endswith(("_slot_num", "scale_base", "final_norm"))}
    keys["norm"] = "layernorm"
    reference = tmp_path / "reference.yml"
    reference.write_text(yaml.safe_dump(keys | {"save": str(tmp_path / "reference")}))
    assert run_ranks(reference).code == 0
    loop = Loop(tmp_path / "loop", tmp_path / "reference", data)
    (loop.path / "base.yml").write_text(yaml.safe_dump(keys))
    finished = run_command(["tools/run_stages.py", str(loop.file)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1_layers: validation loss" in finished.stdout and (loop.runs / "decisions.json").exists()
