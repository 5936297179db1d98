"""A DeepSpeed that computes wrong gradients in pipelines is refused: by its version, or after a comparison."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import RecvGrad

from megatron.training.stability.deepspeed_patches import join_process_group
from megatron.training.stability.deepspeed_version import TESTED
from megatron.training.stability.pipeline_check import TOLERANCES, stage_difference
from tests.helpers.configs import TOKENFORMER
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.forkserver import ROOT
from tests.helpers.runs import Finished, run_ranks

PIPELINE = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4, "train_iters": 1, "eval_iters": 0}

DIVIDE_AGAIN = """
_receive = PipelineEngine._INSTRUCTION_MAP[schedule.RecvGrad]
def _receive_and_divide(self, buffer_id):
    _receive(self, buffer_id)
    for gradient in self.grad_layer if isinstance(self.grad_layer, tuple | list) else [self.grad_layer]:
        gradient /= self.gradient_accumulation_steps()
PipelineEngine._INSTRUCTION_MAP[schedule.RecvGrad] = _receive_and_divide
"""
"""What versions 0.18.5 to 0.19.2 did, at the end of the module of the pipeline engine."""


def name_version(folder: Path, version: str) -> Path:
    """Makes a folder which, first on Python's path, has DeepSpeed be of another version."""
    information = folder / f"deepspeed-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: deepspeed\nVersion: {version}\n")
    return folder


def patch_deepspeed(folder: Path) -> None:
    """Puts a DeepSpeed that divides again into a folder."""
    source = Path(deepspeed.__file__).parent
    shutil.copytree(source, folder / "deepspeed", copy_function=os.symlink, ignore=shutil.ignore_patterns("*.pyc"))
    engine = folder / "deepspeed" / "runtime" / "pipe" / "engine.py"
    text = engine.read_text()
    engine.unlink()
    engine.write_text(text + DIVIDE_AGAIN)


def put_first(folder: Path, caches: Path) -> None:
    sys.path.insert(0, str(folder))  # noqa: TID251 - as an environment with another DeepSpeed would
    os.environ |= {"PYTHONPATH": f"{folder}:{os.environ['PYTHONPATH']}", "XDG_CACHE_HOME": str(caches)}


def train_under(config: Path, folder: Path, *overrides: str) -> Finished:
    return run_ranks(config, *overrides, ranks=2, before=put_first, arguments=(folder, folder / "caches"))


def test_the_pinned_version_is_a_tested_one() -> None:
    pins = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    assert {pin.removeprefix("deepspeed==") for pin in pins if pin.startswith("deepspeed==")} <= TESTED


@pytest.mark.parametrize("version", ["0.18.5", "0.19.2"])
def test_known_faults_are_refused(version: str, write_config: Callable[..., Path], tmp_path: Path) -> None:
    finished = train_under(write_config(TOKENFORMER, **PIPELINE), name_version(tmp_path / "other", version))
    assert finished.code == 1
    assert "Traceback" not in finished.output
    assert f"DeepSpeed {version} computes wrong gradients with pipe_parallel_size: 2" in finished.output
    assert "requirements/constraints.txt" in finished.output


def test_one_stage_trains_with_any_version(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(TOKENFORMER, **PIPELINE | {"pipe_parallel_size": 1})
    finished = train_under(config, name_version(tmp_path / "other", "0.19.2"))
    assert finished.code == 0, finished.output
    assert not (tmp_path / "other" / "caches").exists()


def differences(divides: bool) -> dict[str, float]:
    join_process_group()
    if divides:
        names: dict[str, object] = {"PipelineEngine": PipelineEngine, "schedule": sys.modules[RecvGrad.__module__]}
        exec(DIVIDE_AGAIN, names)  # noqa: S102 - the text above
    return {precision: stage_difference(precision) for precision in TOLERANCES}


@pytest.mark.parametrize("divides", [False, True])
def test_the_comparison_tells_right_from_wrong(divides: bool) -> None:
    first, last = run_on_new_ranks(differences, 2, divides)
    for precision, tolerance in TOLERANCES.items():
        assert (first[precision] > tolerance) == divides
        assert last[precision] <= tolerance or divides
    assert not divides or first["fp32"] == pytest.approx(0.75, abs=0.05)


@pytest.mark.full
def test_an_unknown_version_is_compared_once(write_config: Callable[..., Path], tmp_path: Path) -> None:
    other = name_version(tmp_path / "other", "0.20.7")
    config = write_config(TOKENFORMER, **PIPELINE)
    finished = train_under(config, other)
    assert finished.code == 0, finished.output
    assert "DeepSpeed 0.20.7 is not a tested version: comparing two stages with plain torch" in finished.output
    assert finished.output.count("trains two stages as plain torch does") == 1
    (passed,) = (other / "caches").rglob("*.json")
    assert "0.20.7" in passed.name
    again = train_under(config, other, f"save={tmp_path / 'again'}")
    assert again.code == 0, again.output
    assert "0.20.7" not in again.output.removeprefix(finished.output)


@pytest.mark.full
def test_an_unknown_version_that_divides_again_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    other = name_version(tmp_path / "other", "0.20.7")
    patch_deepspeed(other)
    finished = train_under(write_config(TOKENFORMER, **PIPELINE), other)
    assert finished.code == 1
    assert "Traceback" not in finished.output
    assert "DeepSpeed 0.20.7 is not a tested version, and it trains pipelines wrongly: stage 0 of 2" in finished.output
    assert not (other / "caches").exists()


@pytest.mark.full
def test_a_version_that_cannot_be_compared_is_refused(write_config: Callable[..., Path], tmp_path: Path) -> None:
    other = name_version(tmp_path / "other", "0.20.7")
    (other / "deepspeed").mkdir()
    (other / "deepspeed" / "__init__.py").write_text("raise RuntimeError('this DeepSpeed needs another torch')")
    finished = train_under(write_config(TOKENFORMER, **PIPELINE), other)
    assert finished.code == 1
    assert "two stages of it could not be run (RuntimeError: this DeepSpeed needs another torch)" in finished.output
