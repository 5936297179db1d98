"""Matrices of experiments: what runs, what is skipped, what is chosen, and what a kill loses."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.load_config import load_config
from megatron.config.model_size import forward_flops, training_flops
from megatron.errors import CheckpointError, ConfigError
from megatron.io.lease import leased
from tests.helpers.forkserver import ROOT
from tools.experiments import run_matrix
from tools.experiments.matrix import Experiment, ReadyCell, Result

SHIPPED = ROOT / "tools" / "experiments"

# Stands for a trainer: a loss that is lowest at 4e-3 and less with every seed, and a row that says what it has read.
TRAINER = """
import json, pathlib, sys, time, yaml
keys = yaml.safe_load(open(sys.argv[1]))
if keys.get("log_interval") == 13:
    sys.exit(3)
print("begins", flush=True)
time.sleep(keys.get("exit_duration_in_mins", 0))
folder = pathlib.Path(keys["save"])
folder.mkdir()
loss = 3 + 100 * abs(keys["optimizer.params.lr"] - 4e-3) - 0.01 * keys["seed"] - (0.5 if keys.get("load") else 0)
(folder / "metrics.jsonl").write_text(json.dumps({"iteration": 5, "valid/lm_loss": loss}))
(folder / "run.json").write_text(json.dumps({"tokens_per_step": 8, "parameters": 9, "flops_per_token": 7}))
with open(folder.parent / "started.txt", "a") as file:
    file.write(folder.name + "\\n")
"""


class Folder:
    """A matrix with two groups in a folder of its own: three rates, and two seeds that go on from the best one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trainer = path / "trainer.py"
        self.trainer.write_text(TRAINER)
        (path / "base.yml").write_text("seed: 0\nnum_layers: 2\n")
        self.groups: dict[str, Any] = {
            "small": {
                "name": "small-lr{lr}",
                "vary": {"lr": [2e-3, 4e-3, 8e-3]},
                "keys": {"optimizer": {"params": {"lr": "{lr}"}}},
                "commands": [[str(self.trainer), "{config}"]],
                "report": "small={folder}",
            },
            "grown": {
                "name": "{arm}-s{seed}",
                "vary": {"seed": [1, 2], "how": [{"arm": "zero_key"}]},
                "choose": {"lr": {"group": "small"}},
                "lookup": {"arms": "{arm}"},
                "needs": {"trunk": {"groups": ["small"], "same": {"lr": "lr"}}},
                "keys": {
                    "seed": "{seed}",
                    "optimizer": {"params": {"lr": "{lr}"}},
                    "load": "{trunk}",
                    "grow": "{rules}",
                },
                "commands": [[str(self.trainer), "{config}"]],
                "report": "{arm}={trunk}+{folder}",
            },
        }

    def write(self, **keys: Any) -> Path:
        content = {
            "folder": str(self.path / "work"),
            "results": "results/cells.csv",
            "config_files": ["base.yml"],
            "tables": {"arms": {"zero_key": {"rules": {"operator": "zero_key"}}}},
            "groups": self.groups,
        }
        file = self.path / "matrix.yml"
        file.write_text(yaml.safe_dump(content | keys, sort_keys=False))
        return file

    def run(self, *words: str) -> int:
        return run_matrix.main([str(self.write()), "--jobs", "2", *words])

    def rows(self) -> dict[str, dict[str, str]]:
        file = self.path / "results" / "cells.csv"
        if not file.exists():
            return {}
        with file.open(newline="") as rows:
            return {row["cell"]: row for row in csv.DictReader(rows)}

    def started(self) -> list[str]:
        return sorted((self.path / "work" / "cells" / "started.txt").read_text().split())


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


SMALL = ["small-lr0.002", "small-lr0.004", "small-lr0.008"]
GROWN = ["zero_key-s1", "zero_key-s2"]


def test_every_cell_runs_once_after_those_that_it_needs(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.run() == 0
    rows = folder.rows()
    assert sorted(rows) == folder.started() == SMALL + GROWN
    assert {row["status"] for row in rows.values()} == {"done"}
    assert float(rows["zero_key-s2"]["valid_loss"]) == pytest.approx(2.48)
    assert rows["zero_key-s2"]["lr"] == "0.004", "chosen among those of small"
    assert (rows["zero_key-s2"]["steps"], rows["zero_key-s2"]["tokens"]) == ("5", "40")
    keys = yaml.safe_load((folder.path / "work" / "cells" / "zero_key-s1.yml").read_text())
    trunk = folder.path / "work" / "cells" / "small-lr0.004"
    assert keys["load"] == str(trunk)
    assert (keys["grow.operator"], keys["num_layers"], keys["seed"]) == ("zero_key", 2, 1)
    words = (folder.path / "work" / "report.txt").read_text().splitlines()
    assert f"zero_key={trunk}+{trunk.with_name('zero_key-s2')}" in words
    assert "[5/5] zero_key-s" in capsys.readouterr().out
    assert folder.run() == 0
    assert folder.started() == SMALL + GROWN, "what is done is not done again"


def test_a_changed_configuration_runs_again_with_all_that_depends_on_it(folder: Folder) -> None:
    assert folder.run() == 0
    folder.groups["grown"]["vary"]["seed"] = [1, 3]
    assert folder.run() == 0
    assert folder.started() == [*SMALL, *GROWN, "zero_key-s3"]
    (folder.path / "base.yml").write_text("seed: 0\nnum_layers: 3\n")
    assert folder.run("--only", "small") == 0
    assert [folder.started().count(name) for name in (*SMALL, *GROWN)] == [2, 2, 2, 1, 1]
    listed = run_matrix.listing(Experiment(folder.write()), run_matrix.ResultsTable(Experiment(folder.write())))
    assert "zero_key-s1: to do, its configuration has changed" in listed


def test_a_run_that_is_needed_and_gone_is_made_again(folder: Folder) -> None:
    """Results are kept in the repository, and runs are not."""
    assert folder.run() == 0
    shutil.rmtree(folder.path / "work")
    assert folder.run() == 0
    assert not (folder.path / "work" / "cells").exists(), "nothing is left to do"
    folder.groups["grown"]["vary"]["seed"] = [1, 2, 3]
    assert folder.run() == 0
    assert folder.started() == ["small-lr0.004", "zero_key-s3"]
    words = (folder.path / "work" / "report.txt").read_text().splitlines()
    assert [word.partition("=")[0] for word in words] == ["small", "zero_key"]


def test_a_cell_that_fails_is_named_and_tried_again(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.groups["grown"]["keys"]["log_interval"] = 13
    assert folder.run() == 1
    assert {name: row["status"] for name, row in folder.rows().items() if name in GROWN} == dict.fromkeys(
        GROWN, "failed"
    )
    assert "2 cells failed, 2 are not done, of 5" in capsys.readouterr().out
    del folder.groups["grown"]["keys"]["log_interval"]
    assert folder.run() == 0
    assert folder.started() == SMALL + GROWN


def test_a_second_start_names_the_first_and_takes_nothing_from_it(folder: Folder) -> None:
    assert folder.run("--only", "small") == 0
    work = folder.path / "work"
    with (
        leased(work, "run_matrix.py", file=work / ".matrix.lease"),
        pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .*run_matrix\.py"),
    ):
        folder.run()
    assert folder.started() == SMALL
    assert (work / "cells" / "small-lr0.004").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_a_kill_loses_the_running_cell_alone(folder: Folder, number: int) -> None:
    """The last cell sleeps when the signal comes. What outlives a killed runner does not write into the next one's."""
    folder.groups = {"small": folder.groups["small"] | {"vary": {"lr": [4e-3, 8e-3], "wait": [0]}}}
    folder.groups["small"]["keys"]["exit_duration_in_mins"] = "{wait}"
    seconds = 300 if number == signal.SIGTERM else 6
    folder.groups["slow"] = folder.groups["small"] | {"name": "slow", "vary": {"lr": [4e-3], "wait": [seconds]}}
    command = [sys.executable, str(SHIPPED / "run_matrix.py"), str(folder.write()), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    log = folder.path / "work" / "cells" / "slow.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "begins" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == (75 if number == signal.SIGTERM else -number)
    assert sorted(folder.rows()) == ["small-lr0.004", "small-lr0.008"]
    folder.groups["slow"]["vary"] = {"lr": [4e-3], "wait": [0]}
    assert folder.run() == 0
    outlived = ["slow"] if number == signal.SIGKILL else []
    assert folder.started() == [*outlived, "slow", "small-lr0.004", "small-lr0.008"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": {"a": {"name": "a", "vary": {}, "commands": [], "keyz": {}}}}, "groups.a.keyz: Extra inputs"),
        ({"groups": {"a": {"name": "a", "vary": {}, "commands": [], "choose": {"lr": {"group": "b"}}}}}, "group b"),
        ({"groups": {"a": {"name": "{b}", "vary": {"lr": [1]}, "commands": []}}}, "no variable 'b'"),
        ({"groups": {"a": {"name": "a", "vary": {"lr": [1]}, "commands": [], "lookup": {"t": "x"}}}}, "no x"),
        ({"nothing": 1}, "nothing: Extra inputs"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused(folder: Folder, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_matrix.main([str(folder.write(**change)), "--jobs", "1"])
    assert not folder.rows()


def resolved(name: str) -> list[ReadyCell]:
    """All cells of a shipped matrix, with results that let every choice be made."""
    experiment = Experiment(SHIPPED / f"{name}.yml")
    ready: list[ReadyCell] = []
    results: list[Result] = []
    for cell in experiment.cells:
        found = experiment.ready(cell, results)
        assert found is not None, cell
        ready.append(found)
        loss = {"valid_loss": 3.0 + float(found.variables["lr"])}
        results.append(Result(found.name, found.hash, cell, found.variables, loss))
    return ready


def flops_per_step(keys: dict[str, Any]) -> int:
    """Table 3 of the paper and the head, forward and backward, of 32 samples of 128 tokens."""
    layers, tokens = keys.get("num_layers", 3), keys["qkv_slot_num"]
    weights = layers * 2 * 64 * (3 * tokens + tokens + keys["ffn_slot_num"])
    return 32 * 128 * 3 * (2 * weights + 4 * layers * 64 * 128 + 2 * 512 * 64)


TOTAL = 1300 * 32 * 128 * 786_432


@pytest.mark.parametrize(("name", "count"), [("gate", 12), ("growth", 112)])
def test_the_shipped_matrices_are_sound_and_of_equal_cost(name: str, count: int, tmp_path: Path) -> None:
    cells = resolved(name)
    assert len({cell.name for cell in cells}) == len(cells) == count
    for cell in cells:
        file = tmp_path / "cell.yml"
        file.write_text(yaml.safe_dump(dict(cell.keys)))
        run = load_config([file]).run
        assert training_flops(run.model, 512, 128) * 4096 == flops_per_step(dict(cell.keys))
        steps, branch = run.training.train_iters, cell.variables.get("branch", 0)
        small = {"qkv_slot_num": 16, "ffn_slot_num": 64}
        cost = branch * flops_per_step(small) + (steps - branch) * flops_per_step(dict(cell.keys))
        if cell.cell.group == "full":
            assert steps == 1123, "the tokens of a run that has grown at half"
            continue
        assert cost == pytest.approx(TOTAL, rel=1.5e-3), cell.name
        schedule = run.training.lr_schedule
        end = schedule.decay_iters or steps
        assert schedule.warmup * end == pytest.approx(50, abs=0.01)
        decays = (schedule.wsd_decay_iters or 0) * flops_per_step(dict(cell.keys)) / TOTAL
        if branch:
            assert branch * flops_per_step(small) / TOTAL == pytest.approx(cell.variables["at"], abs=1e-9)
            restarts = run.grow is not None and run.grow.schedule == "restart"
            assert end == (steps - branch if restarts else steps)
        if cell.variables.get("arm") != "published" or cell.variables["at"] != 0.8:
            assert decays == pytest.approx(0.2, abs=2e-3), cell.name


def test_the_matrix_of_inheritune_compares_at_equal_cost(tmp_path: Path) -> None:
    """Costs of the models without inheritance, which changes no size, and with the teacher's passes."""
    cells = resolved("inheritune")
    assert len({cell.name for cell in cells}) == len(cells) == 49
    costs: dict[str, float] = {}
    for cell in cells:
        file = tmp_path / "cell.yml"
        file.write_text(yaml.safe_dump({key: value for key, value in cell.keys.items() if "inherit." not in key}))
        run = load_config([file]).run
        flops = training_flops(run.model, 512, 128)
        if run.distillation is not None:
            assert run.distillation.teacher == cell.variables["reference"]
            teacher = run.model.model_copy(update={"num_layers": 12})
            flops += forward_flops(teacher, 512, 128).total
        kind = f"{cell.cell.group} {run.training.train_iters}"
        cost = flops * run.training.train_iters
        assert costs.setdefault(kind, cost) == cost
        assert cell.commands[0][:2] == ("deepy.py", "train.py")
        assert cell.commands[1][:2] == ("tools/analysis/measure_attention.py", str(cell.folder))
    student, reference = costs["random 640"], costs["reference 640"]
    for equal in ("inherited 640", "stack 640", "half 1040", "distilled 390"):
        assert costs[equal] == pytest.approx(student, rel=1e-12), equal
    assert costs["charged 1871"] == pytest.approx(student + reference, rel=2e-4)
