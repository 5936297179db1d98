"""Training runs of real configurations, data and loop, inside the pools of gloo workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch

from megatron.config.load import load_config
from megatron.training import setup
from megatron.training.progress import Step
from tests.helpers.distributed import run_distributed


@dataclass
class History:
    """What one rank saw, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Gradient norms before clipping."""
    learning_rates: list[float] = field(default_factory=list)


def train_in_pool(config: Path, overrides: Sequence[str], world_size: int) -> list[History]:
    """Train `config` with `overrides` on `world_size` ranks; their histories, by rank."""
    return run_distributed(train_rank, world_size, config, list(overrides))


def train_rank(config: Path, overrides: list[str]) -> History:
    deepspeed.init_distributed("gloo", verbose=False)
    loaded = load_config([config], overrides)
    batch = loaded.batch(torch.distributed.get_world_size())
    history = History()
    original = setup.train

    def recorded(engine: Any, *arguments: Any) -> None:
        *rest, callbacks = arguments
        original(engine, *rest, [_Recorder(engine, history), *callbacks])

    with mock.patch.object(setup, "train", recorded):
        setup.pretrain_in_group(loaded.run, batch, loaded.run_folder)
    return history


@dataclass
class _Recorder:
    engine: Any
    history: History

    def before_training(self) -> None:
        pass

    def after_step(self, step: Step) -> None:
        self.history.losses.append(float(step.loss))
        self.history.norms.append(float(self.engine.get_global_grad_norm()))
        self.history.learning_rates.append(step.learning_rate)
