"""The monitor: which writers a configuration gets, and that losing one costs nothing else."""

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron import registry
from megatron.config.sections.monitor import MonitorConfig, WandbConfig
from megatron.errors import EnvironmentSetupError
from megatron.monitor.metrics_file import read_records
from megatron.monitor.metrics_writer import WRITERS, BackendLostError, RunEvent
from megatron.monitor.monitor import Monitor, build_monitor
from megatron.monitor.writers.jsonl import JsonlWriter


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Flaky:
    """Takes so many records, then is lost."""

    def __init__(self, lives: int) -> None:
        self.lives = lives
        self.calls = 0

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        if self.calls > self.lives:
            raise BackendLostError("flaky: connection reset")

    def mark(self, event: RunEvent) -> None:
        self.write(event.iteration, {})

    def close(self) -> None:
        raise AssertionError("a lost writer is not closed")


def _build(config: MonitorConfig, folder: Path, *, rank: int = 0, resume_iteration: int = 0) -> Monitor:
    return build_monitor(
        config,
        folder,
        rank=rank,
        run_name="tiny",
        total_iterations=30,
        resume_iteration=resume_iteration,
        config_dump={},
    )


def test_a_lost_writer_is_reported_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flaky = Flaky(lives=2)
    with caplog.at_level(logging.WARNING), Monitor([flaky, JsonlWriter.start(tmp_path / "metrics.jsonl")]) as monitor:
        for step in range(1, 6):
            monitor.write(step, {"train/lm_loss": 1.0})
    assert flaky.calls == 3
    assert [record.getMessage() for record in caplog.records] == [
        "flaky: connection reset. The run goes on without it; metrics.jsonl has everything."
    ]
    assert [record["iteration"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_mistake_in_a_writer_is_not_swallowed() -> None:
    class Broken(Flaky):
        def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
            raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        Monitor([Broken(0)]).write(1, {})


def test_every_run_has_its_record_and_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _build(MonitorConfig(), tmp_path / "run") as monitor:
        for step in (10, 20, 30):
            monitor.write(step, {"consumed_tokens": step, "train/lm_loss": 30.0 / step})
    with _build(MonitorConfig(), tmp_path / "run", resume_iteration=10) as monitor:
        monitor.write(20, {"consumed_tokens": 20, "train/lm_loss": 7.0})
    assert _names(tmp_path / "run") == ["metrics.jsonl"]
    assert [record["train/lm_loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl")] == [3.0, 7.0]
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 10/30",
        "step 20/30",
        "step 30/30",
        "step 20/30",
    ]


def test_other_ranks_leave_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = MonitorConfig(tensorboard_dir=str(tmp_path / "board"), wandb=WandbConfig(enabled=True))
    with _build(config, tmp_path / "run", rank=3) as monitor:
        monitor.write(1, {"train/lm_loss": 1.0})
    assert _names(tmp_path) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("package", "config"),
    [
        ("tensorboard", MonitorConfig(tensorboard_dir="board")),
        ("wandb", MonitorConfig(wandb=WandbConfig(enabled=True))),
    ],
)
def test_a_missing_package_that_was_asked_for_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, config: MonitorConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "is_installed", lambda name: name != package)
    with pytest.raises(EnvironmentSetupError, match=rf"'{package}'.*pip install -e '\.\[monitor\]'"):
        _build(config, tmp_path / "run")


def test_dashboards_are_imported_only_when_asked_for() -> None:
    code = "import sys, megatron.monitor.monitor\nprint(*{'wandb', 'tensorboard', 'torch'}.intersection(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert output.split() == []


def test_a_new_writer_is_one_registration(tmp_path: Path) -> None:
    taken: list[int] = []

    class Listing(Flaky):
        def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
            taken.append(iteration)

        def close(self) -> None:
            taken.append(0)

    WRITERS.register("listing")(lambda config, run: Listing(0))
    try:
        with _build(MonitorConfig(), tmp_path / "run") as monitor:
            monitor.write(7, {"train/lm_loss": 1.0})
    finally:
        WRITERS.unregister("listing")
    assert taken == [7, 0]
