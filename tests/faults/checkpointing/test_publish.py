"""Saves of a step that is there already, killed at any moment."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.publish import put_back_replaced
from tests.helpers.checkpoints import save
from tests.helpers.faults import watch_save
from tests.helpers.forkserver import CONTEXT, ENVIRONMENT


def _save_step_10_again(folder: Path, kill_at: int) -> None:
    os.setsid()
    os.environ["RANK"] = "0"
    watch_save(10, None, kill_at)
    save(folder, 10, tensors=torch.zeros(3))


@pytest.mark.full
def test_killed_while_a_step_is_saved_again(tmp_path: Path) -> None:
    """Before each single thing that it does to the folder: the old or the new one is there, whole."""
    kept = []
    for number in itertools.count():
        folder = tmp_path / str(number)
        save(folder, 10)
        process = CONTEXT.Process(target=_save_step_10_again, args=(folder, number))
        with mock.patch.dict(os.environ, ENVIRONMENT):
            process.start()
        process.join()
        put_back_replaced(folder)
        found = find_checkpoint(folder, None, "full")
        assert found is not None and found.state.iteration == 10
        kept.append(len(torch.load(found.path / "layer_00.pt", weights_only=True)))
        save(folder, 10)
        assert {path.name for path in folder.iterdir()} == {"global_step10", "latest"}
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert len(kept) > 15
    assert kept == sorted(kept, reverse=True), "the old one until a certain moment, then the new one"
    assert set(kept) == {1000, 3}
