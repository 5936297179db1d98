"""An optimizer that a test adds by its one file: trained, saved, resumed, converted to other layouts, reshaped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers import adabelief
from tests.helpers.configs import TOKENFORMER, layout_keys, write_dataset
from tests.helpers.records import records
from tests.helpers.runs import Finished, run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

HALF, STEPS = 5, 10
Layout = tuple[int, int, int]
"""(tensor, pipe, data) parallel sizes."""
SAVED_LAYOUT: Layout = (1, 1, 2)


class Runs:
    """Runs in a folder, of a TokenFormer with tied embeddings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, layout: Layout, **changes: Any) -> Path:
        path = self.folder / f"{name}.yml"
        settings = {"save": str(self.folder / name), "train_iters": STEPS, "no_weight_tying": False} | changes
        path.write_text(yaml.safe_dump(TOKENFORMER | adabelief.KEYS | self.data | layout_keys(*layout) | settings))
        return path

    def run(self, name: str, layout: Layout, **changes: Any) -> Finished:
        config = self.config(name, layout, **changes)
        return run_ranks(config, ranks=math.prod(layout), before=adabelief.register)

    def whole(self, precision: str) -> Path:
        """The folder of an uninterrupted run."""
        folder = self.folder / f"whole-{precision}"
        if not folder.exists():
            finished = self.run(folder.name, SAVED_LAYOUT, precision=precision)
            assert finished.code == 0, finished.output
        return folder

    def half(self, precision: str) -> Path:
        """The checkpoint of a run that was stopped after the first half."""
        folder = self.folder / f"half-{precision}"
        if not folder.exists():
            finished = self.run(folder.name, SAVED_LAYOUT, precision=precision, exit_interval=HALF)
            assert finished.code == 75, finished.output
        return folder / f"global_step{HALF}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with adabelief.registered():
        yield Runs(tmp_path_factory.mktemp("runs"))


def assert_continues(run: Path, whole: Path, tolerance: float) -> None:
    for key in ("train/lm_loss", "train/grad_norm"):
        ours, theirs = records(run, key), records(whole, key)
        assert list(ours) == list(range(HALF + 1, STEPS + 1))
        assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=tolerance, rel=0), key


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_a_resumed_run_is_the_uninterrupted_one(precision: str, runs: Runs) -> None:
    finished = runs.run(f"resumed-{precision}", SAVED_LAYOUT, precision=precision, load=str(runs.half(precision)))
    assert finished.code == 0, finished.output
    resumed, whole = runs.folder / f"resumed-{precision}", runs.whole(precision)
    assert_continues(resumed, whole, tolerance=0.0)
    assert_same_checkpoint(resumed / f"global_step{STEPS}", whole / f"global_step{STEPS}")


def test_a_checkpoint_holds_its_moments_by_their_names(runs: Runs) -> None:
    """With these moments, the optimizer's equation leads from the master weights of one save to those of the next."""
    once = {"train_iters": 2, "checkpoint_factor": 1, "warmup": 0, "lr_decay_style": "constant"}
    assert runs.run("moments", (2, 1, 1), **once).code == 0
    before, after = (
        {name: state for layer in read_states(read_checkpoint(path)) for name, state in layer.by_global_name()}
        for path in (runs.folder / "moments" / "global_step1", runs.folder / "moments" / "global_step2")
    )
    for name, state in after.items():
        assert tuple(state.moments) == adabelief.MOMENTS
        assert state.step is None
        mean, surprise = (state.moments[moment].double() for moment in adabelief.MOMENTS)
        weight = before[name].master.double() * (1.0 - 1e-3 * 0.1) - 1e-3 * mean / (surprise.sqrt() + 1e-3)
        torch.testing.assert_close(state.master.double(), weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "layout", [(2, 1, 1), *(pytest.param(layout, marks=pytest.mark.full) for layout in [(1, 1, 1), (1, 2, 1)])], ids=str
)
def test_a_run_goes_on_in_another_layout(layout: Layout, runs: Runs) -> None:
    finished = runs.run(f"{layout}", layout, load=str(runs.half("fp32")))
    assert finished.code == 0, finished.output
    assert "written in another layout" in finished.output
    assert_continues(runs.folder / f"{layout}", runs.whole("fp32"), tolerance=1e-5)


def test_reshaping_there_and_back_is_bit_identical(runs: Runs) -> None:
    source = runs.half("fp32")
    for name, origin, layout in (("there", source, (2, 2, 1)), ("back", runs.folder / "there", SAVED_LAYOUT)):
        config = runs.config(f"for-{name}", layout)
        folders = ["--input_dir", str(origin), "--config_file", str(config), "--output_dir", str(runs.folder / name)]
        assert reshape.main([*folders, "--ranks", str(math.prod(layout))]) == 0
    assert_same_checkpoint(runs.folder / "back" / source.name, source)
    finished = runs.run("reshaped", (2, 2, 1), load=str(runs.folder / "there"))
    assert finished.code == 0, finished.output
    assert "another layout" not in finished.output
    assert_continues(runs.folder / "reshaped", runs.whole("fp32"), tolerance=1e-5)
