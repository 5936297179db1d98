"""Runs survive the loss of a dashboard."""

import threading
from pathlib import Path

import pytest

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.metrics_file import read_records
from megatron.monitor.monitor import build_monitor
from tests.helpers.wandb_runs import run_with_wandb


def test_the_run_survives_an_unreachable_server(tmp_path: Path) -> None:
    process = run_with_wandb(tmp_path / "run", 0, 3, WANDB_MODE="online", WANDB_INIT_TIMEOUT="1")
    assert (process.returncode, process.stdout.splitlines()[-1]) == (0, "finished"), process.stderr
    assert process.stderr.count("The run goes on without it") == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 3


def test_the_run_survives_the_death_of_wandbs_own_process(tmp_path: Path) -> None:
    process = run_with_wandb(tmp_path / "run", 0, 12, WANDB_MODE="offline", KILL_SERVICE_AT="4")
    assert process.stdout.splitlines()[-1] == "finished", process.stderr
    assert process.stderr.count("The run goes on without it") == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 12


def test_the_run_survives_an_unwritable_tensorboard_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    config = MonitorConfig(tensorboard_dir=str(tmp_path / "file"))
    with build_monitor(
        config, tmp_path / "run", rank=0, run_name="tiny", total_iterations=2, resume_iteration=0, config_dump={}
    ) as monitor:
        monitor.write(1, {"train/lm_loss": 2.0})
    assert "TensorBoard: NotADirectoryError" in caplog.text
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device without space")
def test_the_run_survives_a_full_disk_under_tensorboard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard's thread dies of it, which pytest would report.
    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    config = MonitorConfig(tensorboard_dir=str(tmp_path / "board"))
    with build_monitor(
        config, tmp_path / "run", rank=0, run_name="tiny", total_iterations=9, resume_iteration=0, config_dump={}
    ) as monitor:
        monitor.write(1, {"train/lm_loss": 2.0})
        (events,) = (tmp_path / "board" / "tiny").iterdir()
        # TensorBoard opens the file anew for each flush, and so finds the full disk behind the link.
        events.unlink()
        events.symlink_to("/dev/full")
        for step in range(2, 5):
            monitor.write(step, {"train/lm_loss": 2.0})
    assert caplog.text.count("TensorBoard: OSError") == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 4
