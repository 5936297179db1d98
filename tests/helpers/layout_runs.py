"""Runs in several layouts, each half and each whole one trained once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.runs import Finished, run_ranks

HALF, STEPS = 10, 20
TOLERANCE = 1e-5
BASES = {"tokenformer": TOKENFORMER, "pythia": PYTHIA}
Layout = tuple[int, int, int]


class Runs:
    """Runs in a folder; each half and each whole run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, layout: Layout, keys: dict[str, Any]) -> Path:
        """A configuration whose checkpoints and records go to the folder `name`."""
        config = self.folder / f"{name}.yml"
        settings = self.data | {"save": str(self.folder / name), "train_iters": STEPS, "gradient_clipping": 0.5}
        config.write_text(yaml.safe_dump(keys | layout_keys(*layout) | settings))
        return config

    def run(self, name: str, layout: Layout, keys: dict[str, Any], **more: Any) -> Finished:
        """Train in `layout` with the checkpoints and records in the folder `name`."""
        return run_ranks(self.config(name, layout, keys), ranks=math.prod(layout), **more)

    def half(self, layout: Layout, keys: dict[str, Any], name: str) -> Path:
        """The checkpoint after the first half."""
        folder = self.folder / f"half-{name}-{layout}"
        if not folder.exists():
            finished = self.run(folder.name, layout, keys | {"exit_interval": HALF})
            assert finished.code == 75, finished.output
        return folder / f"global_step{HALF}"

    def whole(self, keys: dict[str, Any], name: str) -> Path:
        """The uninterrupted run on one rank."""
        folder = self.folder / f"whole-{name}"
        if not folder.exists():
            finished = self.run(folder.name, (1, 1, 1), keys)
            assert finished.code == 0, finished.output
        return folder


def curve(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows}


def assert_continues(run: Path, whole: Path, tolerance: float = TOLERANCE) -> None:
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "consumed_tokens", "train/skipped_steps"):
        ours, theirs = curve(run, key), curve(whole, key)
        assert list(ours) == list(range(HALF + 1, STEPS + 1))
        assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=tolerance, rel=0), key
