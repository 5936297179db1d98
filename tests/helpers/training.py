"""Training runs of real configurations, data and loop, on gloo ranks that note what they see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron.config.load_config import load_config
from megatron.model.layer import HiddenDropout
from megatron.mpu.parameters import parameter_spec
from megatron.training.pretrain import pretrain_in_group
from tests.helpers.distributed import run_on_new_ranks
from tests.helpers.layout_runs import RankRecord


def train_on_ranks(config: Path, world_size: int, timeout: float = 240.0) -> list[RankRecord]:
    """Trains as configured on `world_size` new ranks; returns what each noted, by rank."""
    return run_on_new_ranks(_train_on_this_rank, world_size, config, timeout=timeout)


def _train_on_this_rank(config: Path) -> RankRecord:
    deepspeed.init_distributed("gloo", verbose=False)
    loaded = load_config([config])
    notes: list[RankRecord] = []
    engines: list[Any] = []
    original = PipelineEngine.train_batch

    def train_batch(engine: Any, batches: Iterator[Any]) -> torch.Tensor:
        if not notes:
            engines.append(engine)
            notes.append(_begin_record(engine))
        loss = original(engine, _noted(batches, notes[0]))
        notes[0].curve.append((float(loss.float()), float(engine.get_global_grad_norm())))
        return loss

    with mock.patch.object(PipelineEngine, "train_batch", train_batch):
        pretrain_in_group(loaded.run, loaded.batch(torch.distributed.get_world_size()), loaded.run_folder)
    record, engine = notes[0], engines[0]
    record.last_weights = _weights(engine)
    record.optimizer_elements = _optimizer_elements(engine)
    return record


def _begin_record(engine: Any) -> RankRecord:
    grid = engine.grid
    record = RankRecord(
        tensor_rank=grid.get_slice_parallel_rank(),
        pipe_rank=grid.get_stage_id(),
        data_rank=grid.get_data_parallel_id(),
        split_dims={name: parameter_spec(parameter).shard_dim for name, parameter in engine.module.global_parameters()},
        first_weights=_weights(engine),
    )
    for module in engine.module.modules():
        if isinstance(module, HiddenDropout) and module.probability > 0:
            module.register_forward_hook(lambda module, inputs, output: record.dropped.append(output.detach().clone()))
    return record


def _noted(batches: Iterator[Any], record: RankRecord) -> Iterator[Any]:
    for inputs, (labels, *others) in batches:
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
        record.rows.append(torch.cat([inputs, labels[:, -1:]], dim=1).numpy())
        yield inputs, (labels, *others)


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in engine.module.global_parameters()}


def _optimizer_elements(engine: Any) -> dict[str, int]:
    adam = engine.optimizer.optimizer
    masters = [master for group in adam.param_groups for master in group["params"]]
    elements = {"master": sum(master.numel() for master in masters)}
    for moment in ("exp_avg", "exp_avg_sq"):
        elements[moment] = sum(adam.state[master][moment].numel() for master in masters if moment in adam.state[master])
    return elements
