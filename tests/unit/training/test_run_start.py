"""The schedule that a resumed run follows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.load_config import load_config
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.training.run_start import RunStart, adopt_schedule
from tests.helpers.forkserver import ROOT

PYTHIA = ROOT / "configs" / "pythia" / "14M.yml"


def run(*overrides: str) -> RunConfig:
    """Pythia on a WSD schedule; the overrides change it."""
    changes = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": "100"} | dict(each.split("=") for each in overrides)
    return load_config([PYTHIA], [f"{key}={value}" for key, value in changes.items()]).run


def resumed(*overrides: str) -> RunStart:
    """The start from a checkpoint that was trained with these overrides."""
    checkpoint = SimpleNamespace(path=Path("runs/old"), config=run(*overrides))
    return RunStart("id", checkpoint=cast(Checkpoint, checkpoint), continues=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr_wsd_decay_iters=200", "wsd_decay_iters: checkpoint 100, configuration 200"),
        ("lr_wsd_decay_style=linear", "wsd_decay_style: checkpoint exponential, configuration linear"),
    ],
)
def test_another_decay_at_the_end_is_refused_unless_chosen(override: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        adopt_schedule(run(override), resumed())
    overridden = run(override, "override_lr_scheduler=true")
    assert adopt_schedule(overridden, resumed()) == overridden
    followed = adopt_schedule(run(override, "use_checkpoint_lr_scheduler=true"), resumed())
    expected = run("use_checkpoint_lr_scheduler=true").training.lr_schedule
    decay_iters = run().training.lr_schedule.decay_iters or run().training.train_iters
    assert followed.training.lr_schedule == expected.model_copy(update={"decay_iters": decay_iters})


def test_the_same_schedule_goes_on() -> None:
    assert adopt_schedule(run(), resumed()) == run()
