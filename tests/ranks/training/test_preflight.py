"""--preflight and --calibrate on real ranks: what is tried, what is found wrong, and that nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import yaml

from megatron.config.load_config import load_config
from megatron.training.preflight import Tried, try_run
from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER, write_dataset
from tests.helpers.distributed import run_on_new_ranks


def write(folder: Path, **changes: Any) -> Path:
    prefix = write_dataset(folder / "text")
    path = folder / "run.yml"
    settings = TOKENFORMER | {"data_path": str(prefix), "save": str(folder / "deep" / "run")} | changes
    path.write_text(yaml.safe_dump(settings))
    return path


def _try(path: Path) -> list[Tried]:
    deepspeed.init_distributed("gloo", verbose=False)
    loaded, found = load_config([path]), []
    try_run(loaded.run, loaded.batch(torch.distributed.get_world_size()), loaded.run_folder, found.append)
    return found


def test_two_ranks_try_everything_and_leave_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, model_parallel_size=2, async_save=True, index_cache_dir=str(tmp_path / "indices"))
    before = {entry.name for entry in tmp_path.iterdir()}
    first, second = run_on_new_ranks(_try, 2, path)
    assert [one.what for one in first] == [one.what for one in second]
    found = {one.what: one for one in first}
    assert {"save", "start", "data", "disk", "step", "memory", "files"} <= found.keys()
    assert {one.kind for one in first} <= {"ok", "warning"}
    assert found["machines"].kind == "ok"
    assert found["memory"].text.startswith(("rank 0 (", "rank 1 ("))
    assert found["start"].text == "starting from initial weights"
    assert "a save to nowhere: " in found["files"].text
    assert {entry.name for entry in tmp_path.iterdir()} - before == {"indices"}


@pytest.mark.full
def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = write(tmp_path)
    good = run_command(["deepy.py", "train.py", str(path), "--preflight"])
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1] == "everything that was tried works"
    bad = run_command(["deepy.py", "train.py", str(path), "--preflight", "data_path=nothing/here"])
    assert bad.returncode == 1
    assert "  wrong    run        DataError: " in bad.stdout
    assert bad.stdout.splitlines()[-1] == "something is wrong: the run would not get far"


@pytest.mark.full
def test_calibration_is_measured_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path)
    done = run_command(["deepy.py", "train.py", str(path), "--calibrate"])
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "cache" / "megatron-tokenformer" / "calibration").iterdir()
    content = json.loads(file.read_text())
    rates = [rate for _, rate in content["formats"]["fp32"]["products"]]
    assert all(1e8 < rate < 1e15 for rate in rates)
    planned = run_command(["deepy.py", "train.py", str(path), "--plan", "--device", "cpu"])
    assert "assumed (measured on " in planned.stdout
