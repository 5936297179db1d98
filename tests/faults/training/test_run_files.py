"""Files in the run's folder: links in their place, a disk without room."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.faults import this_rank
from tests.helpers.interrupted import TWO_RANKS
from tests.helpers.records import records
from tests.helpers.runs import run_ranks

SHORT = TWO_RANKS | {"train_iters": 3, "eval_iters": 0, "log_batch_hashes": True}
FILES = ("run.json", "metrics.jsonl", "batch_hashes.jsonl")


def test_links_in_the_place_of_files_are_replaced(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(SHORT)
    run = config.with_suffix("")
    run.mkdir()
    for name in FILES:
        (tmp_path / f"precious {name}").write_text("mine")
        (run / name).symlink_to(tmp_path / f"precious {name}")
    assert run_ranks(config, ranks=2).codes == [0, 0]
    for name in FILES:
        assert (tmp_path / f"precious {name}").read_text() == "mine"
        assert not (run / name).is_symlink()
    assert json.loads((run / "run.json").read_text())["name"] == "tiny"
    assert list(records(run, "train/lm_loss")) == [1, 2, 3]


def no_room_for(what: str) -> None:
    """Files of rank 0 can grow to 100 bytes while `what` is written."""
    from megatron.monitor.writers.jsonl import JsonlWriter
    from megatron.training import training_context

    owner, name = {
        "run.json": (training_context, "write_description"),
        "metrics.jsonl": (JsonlWriter, "write"),
    }[what]
    original = getattr(owner, name)

    def limited(*arguments: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            original(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    if this_rank() == 0:
        setattr(owner, name, limited)


def test_run_json_is_whole_or_as_it_was_on_a_full_disk(write_config: Callable[..., Path]) -> None:
    config = write_config(SHORT)
    run = config.with_suffix("")
    run.mkdir()
    (run / "run.json").write_text("of the start before")
    finished = run_ranks(config, ranks=2, before=no_room_for, arguments=("run.json",))
    assert finished.codes == [1, 1], finished.output
    assert f"EnvironmentSetupError: {run / 'run.json'}: File too large" in finished.output
    assert "Traceback" not in finished.output
    assert (run / "run.json").read_text() == "of the start before"
    assert not list(run.glob("*.tmp")) and not (run / ".lease").exists()


def test_metrics_on_a_full_disk_end_the_run_with_the_files_name(write_config: Callable[..., Path]) -> None:
    config = write_config(SHORT)
    finished = run_ranks(config, before=no_room_for, arguments=("metrics.jsonl",))
    assert finished.codes == [1], finished.output
    assert f"EnvironmentSetupError: {config.with_suffix('')}/metrics.jsonl: File too large" in finished.output
    assert "Traceback" not in finished.output
    assert (config.with_suffix("") / "metrics.jsonl").read_text() == "", "no half of a line is left"


@pytest.mark.parametrize("ranks", [2])
def test_metrics_that_cannot_be_opened_are_told_on_all_ranks(ranks: int, write_config: Callable[..., Path]) -> None:
    config = write_config(SHORT)
    (config.with_suffix("") / "metrics.jsonl").mkdir(parents=True)
    (config.with_suffix("") / "metrics.1.jsonl").mkdir()
    finished = run_ranks(config, "log_dir=/dev/null", ranks=ranks)
    assert finished.codes == [1] * ranks, finished.output
    assert "Traceback" not in finished.output and "log_dir: /dev/null cannot be written" in finished.output
