"""A run that loads files which are not what DeepSpeed writes ends with one line, however well they are sealed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpointing.store.safe_load import load_tensors
from tests.helpers.checkpoints import reseal
from tests.helpers.layout_runs import SPLIT, LayoutRuns


@pytest.mark.parametrize("layout", [SPLIT.layout, (1, 1, 1)])
def test_a_foreign_optimizer_state(layout: tuple[int, int, int], layout_runs: LayoutRuns, half_copy: Path) -> None:
    for file in half_copy.glob("*_optim_states.pt"):
        content = load_tensors(file, mmap=False)
        del content["optimizer_state_dict"]["base_optimizer_state"]
        torch.save(content, file)
    reseal(half_copy)
    finished = layout_runs.start(f"hostile-{layout}", layout, SPLIT.model_keys() | {"load": str(half_copy)})
    assert finished.code == 1, finished.output
    assert "CheckpointError: " in finished.output and "DeepSpeed 0.19.8 writes" in finished.output
    assert str(half_copy) in finished.output
    assert "Traceback" not in finished.output
