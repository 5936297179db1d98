"""How checkpoints come into a run's folder and leave it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.store.checkpoint import checkpoint_paths
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.publish import clear_leftovers, put_back_replaced, remove_old
from megatron.config.sections.checkpoint import CheckpointConfig
from tests.helpers.checkpoints import save


def iterations(folder: Path) -> list[int]:
    return sorted(iteration for iteration, _ in checkpoint_paths(folder))


def keep(last: int | None, **more: object) -> CheckpointConfig:
    return CheckpointConfig.model_validate({"keep_last_n_checkpoints": last, **more})


@pytest.mark.parametrize("written", ["absolute", "trailing slash", "relative", "relative with a slash", "dotted"])
def test_retention_keeps_the_newest(tmp_path: Path, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    name = {
        "absolute": str(tmp_path / "run"),
        "trailing slash": f"{tmp_path}/run/",
        "relative": "run",
        "relative with a slash": "run/",
        "dotted": "./runs/../run",
    }[written]
    for iteration in (5, 10, 100):
        save(Path(name), iteration)
    remove_old(Path(name), keep(2), "run")
    assert iterations(tmp_path / "run") == [10, 100]
    assert not list((tmp_path / "run").glob(".*"))


def test_without_a_limit_all_are_kept(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    remove_old(tmp_path, keep(None), "run")
    assert iterations(tmp_path) == [1, 2, 3]


def test_retention_counts_whole_checkpoints_of_this_run_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, run_id="another run")
    save(tmp_path, 3)
    for iteration in (4, 5, 6):
        save(tmp_path, iteration)
    (tmp_path / "global_step4" / "layer_00.pt").unlink()
    (tmp_path / "global_step5" / "manifest.json").unlink()
    (tmp_path / "global_step6" / "layer_00.pt").write_bytes(b"short")
    remove_old(tmp_path, keep(1), "run")
    assert iterations(tmp_path) == [2, 3, 4, 5, 6]


def test_retention_never_removes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for iteration in (2, 3):
        (save(tmp_path, iteration) / "layer_00.pt").unlink()
    remove_old(tmp_path, keep(1), "run")
    assert iterations(tmp_path) == [1, 2, 3]


def test_milestones_are_kept_for_ever(tmp_path: Path) -> None:
    for iteration in (0, 1, 2, 3, 4, 5, 6, 7):
        save(tmp_path, iteration)
    extra = {"extra_save_iters": [0, 1], "keep_extra_save_iters": True}
    remove_old(tmp_path, keep(2, **extra, keep_every_n_iters=4), "run")
    assert iterations(tmp_path) == [0, 1, 4, 6, 7]
    remove_old(tmp_path, keep(2, extra_save_iters=[0, 1], keep_every_n_iters=4), "run")
    assert iterations(tmp_path) == [0, 4, 6, 7]


def test_retention_touches_nothing_else(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", 1)
    run = tmp_path / "run"
    for iteration in (10, 20, 30):
        save(run, iteration)
    (run / "global_step1").symlink_to(elsewhere)
    for name in ("global_step_notes", "global_step5", "global_stepX", "my_global_step7", "global_step8.bak"):
        (run / name).mkdir()
    for name in ("global_step9", "zero_to_fp32.py", "metrics.jsonl"):
        (run / name).touch()
    before = {path.name for path in run.iterdir()}
    remove_old(run, keep(1), "run")
    assert {path.name for path in run.iterdir()} == before - {"global_step10", "global_step20"}
    assert (elsewhere / "layer_00.pt").exists()


def test_leftovers_of_killed_saves_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 10)
    for name in (".global_step20.writing", ".global_step5.removed", ".global_step10.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layer_00.pt").touch()
    others = {".global_step20.mine", ".hidden", "global_step20.writing", ".global_step.writing"}
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / ".global_step30.writing").symlink_to(tmp_path / "outside")
    clear_leftovers(tmp_path)
    kept = {"global_step10", "latest", "outside", ".global_step30.writing"} | others
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "outside" / "file").exists()


def test_a_checkpoint_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 10).rename(tmp_path / ".global_step10.replaced")
    assert find_checkpoint(tmp_path, None, "full") is None
    put_back_replaced(tmp_path)
    found = find_checkpoint(tmp_path, None, "full")
    assert found is not None and found.state.iteration == 10


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    again = save(tmp_path, 10, tensors=torch.zeros(3))
    assert torch.equal(torch.load(again / "layer_00.pt", weights_only=True), torch.zeros(3))
    assert {path.name for path in tmp_path.iterdir()} == {"global_step10", "latest"}


@pytest.mark.parametrize("what", ["folder of notes", "another run's", "damaged", "link", "file"])
def test_what_is_in_the_way_is_kept_under_another_name(tmp_path: Path, what: str) -> None:
    run, final = tmp_path / "run", tmp_path / "run" / "global_step10"
    if what == "folder of notes":
        final.mkdir(parents=True)
    elif what == "another run's":
        save(run, 10, run_id="another run")
    elif what == "damaged":
        (save(run, 10) / "manifest.json").unlink()
    elif what == "link":
        run.mkdir()
        final.symlink_to(save(tmp_path / "elsewhere", 10))
    else:
        run.mkdir()
        final.touch()
    save(run, 10)
    found = find_checkpoint(run, None, "full")
    assert found is not None and found.path.is_dir() and not found.path.is_symlink()
    assert (run / "global_step10.kept1").exists()
    save(run, 10)
    assert not (run / "global_step10.kept2").exists()


def test_what_cannot_be_deleted_now_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a network file system a folder stays as long as somebody has a file of it open."""

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    for iteration in (1, 2):
        save(tmp_path, iteration)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        remove_old(tmp_path, keep(1), "run")
        save(tmp_path, 2)
    assert "could not be deleted (Device or resource busy); the next save tries again" in caplog.text
    assert {path.name for path in tmp_path.glob(".*")} == {".global_step1.removed", ".global_step2.replaced"}
    found = find_checkpoint(tmp_path, None, "full")
    assert found is not None and found.state.iteration == 2
    save(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"global_step2", "global_step3", "latest"}
