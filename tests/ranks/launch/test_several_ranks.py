"""Two ranks on a CPU, started as a user starts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER
from tests.helpers.records import records
from tests.helpers.runs import train


def test_tensor_parallel_ranks_train_what_one_rank_trains(write_config: Callable[..., Path]) -> None:
    alone, together = (write_config(TOKENFORMER, name, train_iters=4) for name in ("alone", "together"))
    train(alone)
    finished = run_command(["deepy.py", "train.py", str(together), "num_gpus=2", "model_parallel_size=2"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one, two = alone.with_suffix(""), together.with_suffix("")
    for key, tolerance in (("train/lm_loss", 1e-6), ("train/grad_norm", 1e-5), ("valid/lm_loss", 1e-6)):
        want = records(one, key)
        assert records(two, key) == pytest.approx(want, abs=tolerance, rel=0)
        assert want
    shares = [file.name for file in (two / "global_step4").glob("layer_01-*")]
    assert sorted(shares) == ["layer_01-model_00-model_states.pt", "layer_01-model_01-model_states.pt"]
