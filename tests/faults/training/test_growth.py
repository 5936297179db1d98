"""Runs that are killed about their growth, and go on when they are started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import at_step, kill_all_ranks, watch_save
from tests.helpers.interrupted import SAVE
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint

GROW: dict[str, Any] = {"operator": "zero_key", "at_step": SAVE, "qkv_slot_num": 32, "ffn_slot_num": 96}
GROW |= {"learning_rate": "rewarm_new", "rewarm_iters": 2, "moments": "reset_new"}
CURVES = ("train/lm_loss", "valid/lm_loss", "train/learning_rate", "training_flops", "consumed_tokens", "event")


def write(folder: Path, dataset: Path, **changes: Any) -> Path:
    from tests.helpers.interrupted import write as write_interrupted

    return write_interrupted(folder, dataset, grow=GROW, **changes)


def kill_at(step: int) -> None:
    at_step(step, kill_all_ranks)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run that grows, and beside it `events`: what it does to its folder about the growth."""
    folder = tmp_path_factory.mktemp("grows")
    train(write(folder, dataset), before=watch_save, arguments=(SAVE, folder / "events", None))
    return folder / "run"


def assert_ends_like(untouched: Path, config: Path) -> None:
    train(config)
    run = config.with_suffix("")
    assert {path.name for path in run.iterdir()} == {path.name for path in untouched.iterdir()}
    for name in ("global_step6", f"before_growth/global_step{SAVE}"):
        assert_same_checkpoint(run / name, untouched / name)
    for key in CURVES:
        assert records(run, key) == records(untouched, key), key
    lines = (run / "metrics.jsonl").read_text()
    assert lines.count('"event": "growth"') == 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.full)])
def test_killed_before_things_that_growth_does(
    all_of_them: bool, untouched: Path, dataset: Path, tmp_path: Path
) -> None:
    """From the folder of the small model's save on: while that is written, kept, grown, and replaced."""
    events = (untouched.parent / "events").read_text().splitlines()
    publications = [number for number, line in enumerate(events) if "os.rename ./latest.tmp" in line]
    assert len(publications) == 2, "of the small and of the large model"
    assert any("before_growth" in line for line in events)
    some = [publications[0] + 3, publications[1] - 2]
    moments = range(1, publications[1] + 2) if all_of_them else some
    for number in moments:
        config = write(tmp_path / str(number), dataset)
        killed = run_ranks(config, before=watch_save, arguments=(SAVE, None, number))
        assert killed.code == -9, (events[number], killed.output)
        assert_ends_like(untouched, config)


@pytest.mark.parametrize("step", [pytest.param(SAVE, marks=pytest.mark.full), SAVE + 1])
def test_killed_in_the_steps_around_it(step: int, untouched: Path, dataset: Path, tmp_path: Path) -> None:
    config = write(tmp_path, dataset)
    assert run_ranks(config, before=kill_at, arguments=(step,)).code == -9
    assert_ends_like(untouched, config)


@pytest.mark.full
def test_two_ranks_killed_while_the_larger_model_is_written(dataset: Path, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", dataset)
    train(whole, ranks=2)
    config = write(tmp_path / "killed", dataset)
    events = tmp_path / "events"
    train(write(tmp_path / "watched", dataset), ranks=2, before=watch_save, arguments=(SAVE, events, None))
    number = max(n for n, line in enumerate(events.read_text().splitlines()) if "layer_02" in line)
    assert run_ranks(config, ranks=2, before=watch_save, arguments=(SAVE, None, number)).codes == [-9, -9]
    train(config, ranks=2)
    assert_same_checkpoint(config.with_suffix("") / "global_step6", whole.with_suffix("") / "global_step6")


@pytest.mark.full
def test_stopped_with_the_step_that_grows(untouched: Path, dataset: Path, tmp_path: Path) -> None:
    """A limit ends the run where it would have grown; it grows when it is started again."""
    config = write(tmp_path, dataset)
    assert run_ranks(config, f"exit_interval={SAVE}").code == 75
    assert not (config.with_suffix("") / "before_growth").exists()
    assert_ends_like(untouched, config)
