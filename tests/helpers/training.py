"""Training runs of real configurations, data and loop, on gloo ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
import yaml
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.config.load_config import load_config
from megatron.training.pretrain import pretrain_in_group
from tests.helpers.distributed import run_on_new_ranks

Curve = list[tuple[float, float]]
"""(loss, gradient norm before clipping) per step."""


class Probe:
    """Watches the steps of a training run on one rank, from outside the engine; `result` goes back to the test."""

    def __init__(self, engine: Any) -> None:
        """Begins to watch, before the first step."""
        self.engine = engine
        grid = engine.grid
        self.tensor_rank: int = grid.get_slice_parallel_rank()
        self.pipe_rank: int = grid.get_stage_id()
        self.data_rank: int = grid.get_data_parallel_id()
        self.steps_done = 0

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Returns the micro batches that the engine is to read in the next step."""
        return batches

    def after_step(self, loss: float) -> None:
        """Sees the loss of a step that has been taken."""

    def result(self) -> Any:
        """Returns what the test wants to know, to be pickled."""
        raise NotImplementedError


class CurveProbe(Probe):
    """Records the rank's Curve."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.curve: Curve = []

    def after_step(self, loss: float) -> None:
        self.curve.append((loss, float(self.engine.get_global_grad_norm())))

    def result(self) -> Any:
        return self.curve


def train_on_ranks(
    settings: dict[str, Any], folder: Path, world_size: int, probe: type[Probe] = CurveProbe, timeout: float = 240.0
) -> list[Any]:
    """Trains with the YAML keys `settings` on `world_size` ranks; returns the probes' results, by rank.

    The run's files go to a new folder in `folder`.
    """
    name = f"run{len(list(folder.glob('*.yml')))}"
    config = folder / f"{name}.yml"
    config.write_text(yaml.safe_dump(settings | {"log_dir": str(folder / name)}))
    return run_on_new_ranks(train_on_this_rank, world_size, config, probe, timeout=timeout)


def train_on_this_rank(config: Path, probe: type[Probe]) -> Any:
    deepspeed.init_distributed("gloo", verbose=False)
    loaded = load_config([config])
    probes: list[Probe] = []
    original = PipelineEngine.train_batch

    def train_batch(engine: Any, batches: Iterator[Any]) -> torch.Tensor:
        if not probes:
            probes.append(probe(engine))
        loss = original(engine, probes[0].watch(batches))
        probes[0].steps_done += 1
        probes[0].after_step(float(loss.float()))
        return loss

    with mock.patch.object(PipelineEngine, "train_batch", train_batch):
        pretrain_in_group(loaded.run, loaded.batch(torch.distributed.get_world_size()), loaded.run_folder)
    return probes[0].result()
