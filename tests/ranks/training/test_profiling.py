"""Traces, times of a step's parts and the table of communication, as a run writes them; none of them changes a run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config.load_config import load_config
from megatron.errors import ConfigError
from megatron.monitor.metrics_file import METRICS_FILE
from tests.helpers.configs import TOKENFORMER, layout_keys
from tests.helpers.records import records
from tests.helpers.runs import Finished, run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint

SEEN = {"profile": True, "profile_step_start": 2, "profile_step_stop": 3, "log_part_times": True}
STEPS = 4
PARTS = {"data", "forward", "backward", "reduce", "step"}


def run(folder: Path, dataset: Path, layout: tuple[int, int, int], **changes: Any) -> Finished:
    keys = {"data_path": str(dataset), "index_cache_dir": str(folder / "index"), "save": str(folder / "run")}
    settings = TOKENFORMER | layout_keys(*layout, accumulation=2) | keys | {"train_iters": STEPS} | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump(settings))
    finished = run_ranks(folder / "config.yml", ranks=layout[0] * layout[1] * layout[2])
    assert finished.code == 0, finished.output
    return finished


def events(trace: Path) -> list[dict[str, Any]]:
    with gzip.open(trace) as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def test_a_run_is_profiled_and_its_parts_are_timed(dataset: Path, tmp_path: Path) -> None:
    finished = run(tmp_path, dataset, (1, 1, 1), **SEEN, comms_logger={"enabled": True}, memory_profiling=True)
    folder = tmp_path / "run" / "profile"
    assert f"steps 2 to 3 are profiled: {folder}, a trace for each rank" in finished.output
    assert "torch keeps no history of a CPU's memory" in finished.output
    assert "nothing is sent: there is one rank" in finished.output
    assert [path.name for path in folder.iterdir()] == ["step2.rank0.trace.json.gz"]
    names = [event["name"] for event in events(folder / "step2.rank0.trace.json.gz") if event.get("ph") == "X"]
    assert names.count("forward") == names.count("backward") == 2 * 2, "two steps of two micro batches"
    assert names.count("step") == 2
    assert "aten::mm" in names
    for step in range(1, STEPS + 1):
        parts = {part: records(tmp_path / "run", f"time/{part}")[step] for part in (*PARTS, "transfer", "save")}
        assert parts["transfer"] == 0.0 and all(parts[part] > 0.0 for part in PARTS)
        measured = sum(parts.values()) - parts["save"]
        assert measured <= records(tmp_path / "run", "train/step_seconds")[step]


@pytest.mark.full
def test_ranks_are_seen_and_their_numbers_stay(dataset: Path, tmp_path: Path) -> None:
    seen = run(tmp_path / "seen", dataset, (1, 2, 2), **SEEN, comms_logger={"enabled": True}, log_interval=2)
    run(tmp_path / "plain", dataset, (1, 2, 2), log_interval=2)
    assert_same_checkpoint(*(tmp_path / name / "run" / f"global_step{STEPS}" for name in ("seen", "plain")))
    assert len(list((tmp_path / "seen" / "run" / "profile").iterdir())) == 4
    assert seen.output.count("communication per step of rank 0, mean of") == 2
    shown = re.findall(r"^(\w+) +((?:\w|-)+(?: \w+)?) +([\d.]+) +([\d.,]+) +[\d.,]+$", seen.output, re.MULTILINE)
    among = {(operation, ranks) for operation, ranks, _, _ in shown}
    assert ("all_reduce", "data-parallel ranks") in among
    assert any(ranks == "pipeline stages" for _, ranks in among)
    assert records(tmp_path / "seen" / "run", "time/transfer")[STEPS] > 0.0
    plain = (tmp_path / "plain" / "run" / METRICS_FILE).read_text()
    assert "time/" not in plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": True, "profile_step_start": 5, "profile_step_stop": 4}, "is before profile_step_start 5"),
        ({"profile": True, "profile_step_start": 30, "profile_step_stop": 31}, "the run ends with step 20"),
        ({"memory_profiling": True}, "needs profile: true"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(yaml.safe_dump(TOKENFORMER | {"data_path": "nothing/here"} | changes))
    with pytest.raises(ConfigError, match=message):
        load_config([tmp_path / "config.yml"])
