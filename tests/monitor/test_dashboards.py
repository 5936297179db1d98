"""TensorBoard and W&B, read back by their own libraries; W&B runs in processes of its own, as it keeps global state."""

import json
import math
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.metrics_file import read_records
from megatron.monitor.monitor import build_monitor
from megatron.monitor.redaction import REDACTED
from megatron.monitor.writers.tensorboard import TensorBoardWriter

PLANTED_KEY = "0123456789abcdef" * 2 + "planted0"

WANDB_RUN = """
import json, logging, os, sys
from pathlib import Path
from megatron.config.sections.monitor import MonitorConfig, WandbConfig
from megatron.monitor.redaction import REDACTED
from megatron.monitor.monitor import build_monitor

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
folder, resume_iteration, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
wandb_config = WandbConfig(enabled=True, project="tiny", group="tests", team="us", host="http://127.0.0.1:9")
with build_monitor(
    MonitorConfig(wandb=wandb_config), folder, rank=0, run_name="tiny-run", total_iterations=last,
    resume_iteration=resume_iteration,
    config_dump={"model": {"hidden_size": 64}, "hub_token": os.environ["WANDB_API_KEY"]},
) as monitor:
    for step in range(resume_iteration + 1, last + 1):
        if step == int(os.environ.get("KILL_SERVICE_AT", "-1")):
            import psutil
            for child in psutil.Process().children(recursive=True):
                child.kill()
                child.wait()
        monitor.write(step, {"consumed_tokens": step * 100, "train/lm_loss": 8.0 / step})
print("finished")
"""


def _run_with_wandb(folder: Path, resume_iteration: int, last: int, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(folder), str(resume_iteration), str(last)],
        env=inherited
        | {"HOME": str(home), "NETRC": str(home / ".netrc"), "WANDB_API_KEY": PLANTED_KEY, "WANDB_ERROR_REPORTING": "0"}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _wandb_records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The messages in a .wandb file: W&B's own protobufs in a LevelDB log.

    The log: a 7-byte file header, then blocks of 32 KiB holding chunks of crc32 (4 bytes), length (2), type (1: whole,
    2 to 4: first, middle, last part) and data; fewer than 7 bytes at a block's end are padding.
    """
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        parts += chunk
        position += 7 + length
        if kind in {1, 4}:
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def _wandb_history(file: Path) -> list[dict[str, float]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in _wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_offline_is_read_back_and_holds_no_secret(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = _run_with_wandb(folder, 0, 3, WANDB_MODE="offline")
    assert (first.returncode, first.stdout.splitlines()[-1]) == (0, "finished"), first.stderr
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")

    (run,) = [record.run for record in _wandb_records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.entity, run.display_name) == ("tiny", "tests", "us", "tiny-run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() >= {"model": {"hidden_size": 64}, "hub_token": REDACTED}.items()

    rows = _wandb_history(file)
    keys = ("iteration", "consumed_tokens", "train/lm_loss")
    assert [tuple(row[key] for key in keys) for row in rows] == [(1, 100, 8.0), (2, 200, 4.0), (3, 300, 8.0 / 3)]
    metrics = [record.metric for record in _wandb_records(file) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "iteration" for metric in metrics)

    resumed = _run_with_wandb(folder, 2, 4, WANDB_MODE="offline")
    assert resumed.returncode == 0, resumed.stderr
    assert len({path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}) == 1  # the same W&B run
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    assert [record["iteration"] for record in read_records(folder / "metrics.jsonl")] == [1, 2, 3, 4]

    afresh = _run_with_wandb(folder, 0, 1, WANDB_MODE="offline")
    assert afresh.returncode == 0, afresh.stderr
    assert len({path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}) == 2

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if PLANTED_KEY.encode() in path.read_bytes()] == []
    for process in (first, resumed, afresh):
        assert PLANTED_KEY not in process.stdout + process.stderr


def test_the_run_survives_an_unreachable_server(tmp_path: Path) -> None:
    process = _run_with_wandb(tmp_path / "run", 0, 3, WANDB_MODE="online", WANDB_INIT_TIMEOUT="1")
    assert (process.returncode, process.stdout.splitlines()[-1]) == (0, "finished"), process.stderr
    assert process.stderr.count("The run goes on without it") == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 3


def test_the_run_survives_the_death_of_wandbs_own_process(tmp_path: Path) -> None:
    process = _run_with_wandb(tmp_path / "run", 0, 12, WANDB_MODE="offline", KILL_SERVICE_AT="4")
    assert process.stdout.splitlines()[-1] == "finished", process.stderr
    assert process.stderr.count("The run goes on without it") == 1
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 12


@pytest.mark.parametrize("key", ["", "too-short"])
def test_wandb_without_credentials_says_what_to_do_and_does_not_ask(tmp_path: Path, key: str) -> None:
    process = _run_with_wandb(tmp_path / "run", 0, 3, WANDB_MODE="online", WANDB_API_KEY=key)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "EnvironmentSetupError: use_wandb" in last
    assert "`wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline" in last


def _scalars(folder: Path, tag: str) -> list[tuple[int, object]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    # Event files hold values in fp32.
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]


def test_tensorboard_is_read_back_and_forgets_what_a_resumed_run_makes_again(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, resume_iteration=0)
    for step in range(1, 7):
        writer.write(step, {"train/lm_loss": 1.0 / step, "train/learning_rate": 6e-4})
    # Without close, as when the process is killed.
    assert _scalars(tmp_path, "train/lm_loss") == [(step, 1.0 / step) for step in range(1, 7)]
    writer.close()

    writer = TensorBoardWriter(tmp_path, resume_iteration=4)
    writer.write(5, {"train/lm_loss": 5.0, "valid/perplexity": math.nan})
    writer.close()
    kept = [(step, 1.0 / step) for step in range(1, 5)]
    assert _scalars(tmp_path, "train/lm_loss") == [*kept, (5, 5.0)]
    assert _scalars(tmp_path, "train/learning_rate") == [(step, 6e-4) for step in range(1, 5)]


def test_runs_get_tensorboard_folders_of_their_own(tmp_path: Path) -> None:
    config = MonitorConfig(tensorboard_dir=str(tmp_path / "board"))
    for name in ("one", "two", None):
        folder = tmp_path / "runs" / (name or "third")
        with build_monitor(
            config, folder, rank=0, run_name=name, total_iterations=1, resume_iteration=0, config_dump={}
        ) as monitor:
            monitor.write(1, {"train/lm_loss": 2.0})
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == ["one", "third", "two"]
    assert _scalars(tmp_path / "board" / "two", "train/lm_loss") == [(1, 2.0)]


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
