"""At which steps a run saves."""

from __future__ import annotations

from megatron.config.save_schedule import save_iterations
from megatron.config.sections.checkpoint import CheckpointConfig


def test_pythia_saves_154_checkpoints() -> None:
    config = CheckpointConfig(checkpoint_factor=1000, extra_save_iters=[0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    iterations = save_iterations(config, 143000)
    assert len(iterations) == 154
    assert {0, 512, 1000, 143000} <= iterations
    assert 1024 not in iterations


def test_log_schedule() -> None:
    config = CheckpointConfig(checkpoint_factor=3, checkpoint_scale="log")
    assert save_iterations(config, 30) == {1, 3, 9, 27, 30}
