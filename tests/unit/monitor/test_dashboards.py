"""TensorBoard, read back by its own library."""

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.metrics_writer import RunEvent
from megatron.monitor.monitor import build_monitor
from megatron.monitor.writers.tensorboard import TensorBoardWriter


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


def test_tensorboard_shows_events_as_text(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path, resume_iteration=4)
    writer.mark(RunEvent(4, "growth", "grown by zero_key", {}))
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    ((step, text),) = [
        (event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("growth/text_summary")
    ]
    assert (step, text) == (4, b"grown by zero_key")


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
