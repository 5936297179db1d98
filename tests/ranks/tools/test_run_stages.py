"""Stages train one after another, grow between them, go on where they were, and pass exit codes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.checkpointing.store.find_checkpoint import readable_checkpoints
from megatron.config.model_size import training_flops
from megatron.errors import STOPPED_ON_REQUEST
from megatron.growth.loss_curves import read_curve
from megatron.growth.staged_plan import load_plan
from tests.helpers.commands import run_command
from tests.helpers.configs import SEQ_LENGTH, TOKENFORMER, VOCAB_SIZE, write_dataset
from tests.helpers.forkserver import ROOT
from tests.helpers.runs import run_ranks
from tools import run_stages

BASE: dict[str, Any] = TOKENFORMER | {"train_batch_size": 8, "lr_decay_iters": None, "eval_interval": 2, "num_gpus": 1}
PINNED = {"qkv_scale_base": 24, "proj_scale_base": 40, "ffn_scale_base": 48}
STAGES: dict[str, Any] = {
    "small": {"steps": 4},
    "middle": {"steps": 3, "keys": {"ffn_slot_num": 96, "grow": {"operator": "zero_key"}, **PINNED}},
    "large": {"steps": 3, "restart": True, "keys": {"qkv_slot_num": 48}},
}


class Plan:
    """A plan of three stages in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        data = {"data_path": str(write_dataset(path / "text")), "index_cache_dir": str(path / "index")}
        (path / "base.yml").write_text(yaml.safe_dump(BASE | data))
        self.file = path / "plan.yml"
        self.write(STAGES)

    def write(self, stages: dict[str, Any]) -> None:
        content = {"config_files": ["base.yml"], "folder": str(self.runs), "stages": stages}
        self.file.write_text(yaml.safe_dump(content, sort_keys=False))

    def places(self) -> list[run_stages.StagePlace]:
        return [run_stages.StagePlace.of(stage) for stage in load_plan(self.file).stages]

    def newest(self, stage: str) -> int:
        return readable_checkpoints(self.runs / stage)[0].state.iteration

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.runs / stage / "metrics.jsonl").read_text().splitlines()]


class ForkedCommands:
    """Runs the commands of stages in forks, which spend no time on imports."""

    stopped = False

    def __init__(self) -> None:
        self.trained: list[str] = []

    def __call__(self, script: str, *words: str) -> int:
        assert (script, words[0]) == ("deepy.py", "train.py")
        self.trained.append(Path(words[1]).stem)
        return run_ranks(Path(words[1])).code


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path)


def test_stages_grow_one_from_the_other_and_what_is_done_stays_done(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ForkedCommands()
    assert run_stages.train_stages(plan.places(), command) == 0
    assert command.trained == list(STAGES)
    assert [plan.newest(stage) for stage in STAGES] == [4, 7, 3]
    small, middle = ({row["iteration"]: row for row in plan.rows(stage)} for stage in ("small", "middle"))
    assert sorted(small) == [1, 2, 3, 4]
    assert max(middle) == 7 and 5 in middle, "steps go on"
    assert middle[5]["consumed_tokens"] == 5 * 8 * 16, "and so does the data"
    curve, damaged = read_curve("+".join(str(plan.runs / stage) for stage in STAGES))
    assert not damaged
    assert list(curve.train.steps) == list(range(1, 11))
    assert [event.step for event in curve.growths] == [4, 7]
    stages = load_plan(plan.file).stages
    assert curve.tokens == sum(stage.tokens for stage in stages) == 10 * 8 * 16
    costs = [stage.tokens * training_flops(stage.loaded.run.model, VOCAB_SIZE, SEQ_LENGTH) for stage in stages]
    assert curve.flops == pytest.approx(sum(costs), rel=1e-12), "the smaller models' included"
    assert plan.rows("large")[-1]["training_flops"] == pytest.approx(sum(costs), rel=1e-12)
    assert [event.flops for event in curve.growths] == pytest.approx([costs[0], costs[0] + costs[1]], rel=1e-12)
    assert run_stages.main([str(plan.file), "--check"]) == 0
    assert capsys.readouterr().out.count(" done\n") == 3
    again = ForkedCommands()
    assert run_stages.train_stages(plan.places(), again) == 0
    assert again.trained == []


def test_a_stage_that_was_stopped_goes_on(plan: Plan) -> None:
    """An exit code of 75 in the middle of a stage is passed on; that of its end is not."""
    base = plan.path / "base.yml"
    keys = yaml.safe_load(base.read_text())
    base.write_text(yaml.safe_dump(keys | {"exit_duration_in_mins": 1e-9}))
    command = ForkedCommands()
    assert run_stages.train_stages(plan.places(), command) == STOPPED_ON_REQUEST
    assert command.trained == ["small"]
    assert plan.newest("small") < 4
    base.write_text(yaml.safe_dump(keys))
    assert [place.progress for place in plan.places()] == ["25% done", "to do", "to do"]
    assert run_stages.train_stages(plan.places(), ForkedCommands()) == 0
    assert [plan.newest(stage) for stage in STAGES] == [4, 7, 3]


def test_a_stage_that_fails_ends_the_chain_with_its_exit_code(plan: Plan) -> None:
    (plan.path / "text.idx").unlink()
    command = ForkedCommands()
    assert run_stages.train_stages(plan.places(), command) == 1
    assert command.trained == ["small"]


def test_a_finished_stage_that_the_plan_has_changed_since_is_named(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.write({"small": {"steps": 2}})
    assert run_stages.train_stages(plan.places(), ForkedCommands()) == 0
    assert run_stages.main([str(plan.file), "--check", "weight_decay=0.3", "log_interval=7"]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "was trained with" in warning and "0.1, and the plan says 0.3" in warning


@pytest.mark.full
def test_the_command_passes_signals_and_exit_codes(plan: Plan) -> None:
    """SIGTERM during a stage ends the command with 75; started again, it ends with 0."""
    plan.write({"small": {"steps": 150}, "large": STAGES["middle"]})
    command = [sys.executable, str(ROOT / "tools" / "run_stages.py"), str(plan.file)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    metrics = plan.runs / "small" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == STOPPED_ON_REQUEST
    assert 0 < plan.newest("small") < 150
    finished = run_command(["tools/run_stages.py", str(plan.file)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert [plan.newest(stage) for stage in ("small", "large")] == [150, 153]
    assert "small by zero_key" in finished.stdout
