"""Tiny datasets and configurations, commands as users type them, and what runs leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.configs import write_dataset
from tests.helpers.runs import ROOT


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset whose bytes are predictable enough to learn from."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "text_document")


@pytest.fixture
def write_config(tmp_path: Path, dataset: Path) -> Callable[..., Path]:
    """Write a YAML from a base and changes; data, checkpoints and index caches go to the test's folder."""

    def write(base: dict[str, Any], name: str = "tiny", **changes: Any) -> Path:
        folders = {"data_path": str(dataset), "save": str(tmp_path / name), "index_cache_dir": str(tmp_path / "index")}
        path = tmp_path / f"{name}.yml"
        path.write_text(yaml.safe_dump(base | folders | changes))
        return path

    return write


def run_command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root folder, without a GPU."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def records(run: Path, key: str) -> dict[int, float]:
    """iteration -> value of one key of a run's metrics.jsonl, where it was recorded."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows if key in row}
