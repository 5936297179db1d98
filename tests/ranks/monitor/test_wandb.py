"""W&B, read back by its own library; it runs in processes of its own, as it keeps global state."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from megatron.config.redaction import REDACTED
from megatron.monitor.metrics_file import read_records
from tests.helpers.wandb_runs import PLANTED_KEY, run_with_wandb


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
    first = run_with_wandb(folder, 0, 3, WANDB_MODE="offline", MARK_AT="2")
    assert (first.returncode, first.stdout.splitlines()[-1]) == (0, "finished"), first.stderr
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")

    (run,) = [record.run for record in _wandb_records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.entity, run.display_name) == ("tiny", "tests", "us", "tiny-run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() >= {"model": {"hidden_size": 64}, "hub_token": REDACTED}.items()

    rows = _wandb_history(file)
    keys = ("iteration", "consumed_tokens", "train/lm_loss")
    assert [tuple(row[key] for key in keys) for row in rows] == [(1, 100, 8.0), (2, 200, 4.0), (3, 300, 8.0 / 3)]
    summaries = [record.summary for record in _wandb_records(file) if record.WhichOneof("record_type") == "summary"]
    told = {"/".join([item.key, *item.nested_key]): item.value_json for each in summaries for item in each.update}
    assert told["growth/step_2"] == '"grown by zero_key"'
    metrics = [record.metric for record in _wandb_records(file) if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "iteration" for metric in metrics)

    resumed = run_with_wandb(folder, 2, 4, WANDB_MODE="offline")
    assert resumed.returncode == 0, resumed.stderr
    assert len({path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}) == 1  # the same W&B run
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 2
    rows = [record for record in read_records(folder / "metrics.jsonl") if "event" not in record]
    assert [record["iteration"] for record in rows] == [1, 2, 3, 4]

    afresh = run_with_wandb(folder, 0, 1, WANDB_MODE="offline")
    assert afresh.returncode == 0, afresh.stderr
    assert len({path.name for path in folder.glob("wandb/offline-run-*/run-*.wandb")}) == 2

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if PLANTED_KEY.encode() in path.read_bytes()] == []
    for process in (first, resumed, afresh):
        assert PLANTED_KEY not in process.stdout + process.stderr


@pytest.mark.parametrize("key", ["", "too-short"])
def test_wandb_without_credentials_says_what_to_do_and_does_not_ask(tmp_path: Path, key: str) -> None:
    process = run_with_wandb(tmp_path / "run", 0, 3, WANDB_MODE="online", WANDB_API_KEY=key)
    assert process.returncode == 1
    last = process.stderr.splitlines()[-1]
    assert "EnvironmentSetupError: use_wandb" in last
    assert "`wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline" in last
