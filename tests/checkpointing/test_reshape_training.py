"""Runs that go on in another layout, precision or padding of the vocabulary, with the optimizer's state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.covers import pairs, pairwise_cover
from tests.helpers.runs import Finished, run_ranks

HALF, STEPS = 10, 20
TOLERANCE = 1e-5
BASES = {"tokenformer": TOKENFORMER, "pythia": PYTHIA}
Layout = tuple[int, int, int]
LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
"""(tensor, pipe, data) parallel sizes."""


@dataclass(frozen=True)
class Case:
    """A run that changes its layout after the first half."""

    before: Layout
    after: Layout
    model: str
    tied: bool

    def __str__(self) -> str:
        layouts = "-to-".join("tp{}-pp{}-dp{}".format(*layout) for layout in (self.before, self.after))
        return f"{self.model}-{'tied' if self.tied else 'untied'}-{layouts}"

    def choices(self) -> list[Any]:
        """Each size by itself: what is to meet in a cover."""
        return [*self.before, *self.after, self.model, self.tied]


ALL_CASES = [Case(*choices) for choices in product(LAYOUTS, LAYOUTS, BASES, [True, False]) if choices[0] != choices[1]]
COVER = pairwise_cover(ALL_CASES, Case.choices)


class Runs:
    """Runs in a folder; each half and each whole run is made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}

    def run(self, name: str, layout: Layout, keys: dict[str, Any]) -> Finished:
        """Train in `layout` with the checkpoints and records in the folder `name`."""
        config = self.folder / f"{name}.yml"
        settings = self.data | {"save": str(self.folder / name), "train_iters": STEPS, "gradient_clipping": 0.5}
        config.write_text(yaml.safe_dump(keys | layout_keys(*layout) | settings))
        tensor, pipe, data = layout
        return run_ranks(config, ranks=tensor * pipe * data)

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the first half that the test may change, without a conversion."""

    def make(layout: Layout, keys: dict[str, Any] = TOKENFORMER, name: str = "tokenformer") -> Path:
        source = runs.half(layout, keys, name)
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("universal*"))
        return tmp_path / source.name

    return make


def curve(run: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows}


def assert_continues(run: Path, whole: Path, tolerance: float = TOLERANCE) -> None:
    for key in ("train/lm_loss", "train/grad_norm", "train/learning_rate", "consumed_tokens", "train/skipped_steps"):
        ours, theirs = curve(run, key), curve(whole, key)
        assert list(ours) == list(range(HALF + 1, STEPS + 1))
        assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=tolerance, rel=0), key


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[] if case in COVER else pytest.mark.full) for case in ALL_CASES]
)
def test_a_run_goes_on_in_another_layout(case: Case, runs: Runs) -> None:
    keys = BASES[case.model] | {"no_weight_tying": not case.tied}
    name = f"{case.model}-{case.tied}"
    half = runs.half(case.before, keys, name)
    finished = runs.run(f"{case}", case.after, keys | {"load": str(half)})
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    assert_continues(runs.folder / str(case), runs.whole(keys, name))


def test_the_cover_has_every_pair_of_choices() -> None:
    made = set().union(*(pairs(case.choices()) for case in COVER))
    assert made == set().union(*(pairs(case.choices()) for case in ALL_CASES))
    assert len(ALL_CASES) == 168
    assert len(COVER) <= 14


def test_without_the_moments_the_curve_is_another(runs: Runs) -> None:
    """The tolerance is tight enough to tell."""
    half = runs.half((2, 1, 1), TOKENFORMER, "tokenformer")
    finished = runs.run("without", (1, 1, 1), TOKENFORMER | {"load": str(half), "no_load_optim": True})
    assert finished.code == 0, finished.output
    with pytest.raises(AssertionError):
        assert_continues(runs.folder / "without", runs.whole(TOKENFORMER, "tokenformer"))
