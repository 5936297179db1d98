"""Ranks hold and read what no layout changes: full weights, data order, replicas, shares of optimizer state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.parameters import parameter_spec
from tests.helpers.configs import PYTHIA, SEQ_LENGTH, TOKENFORMER, VOCAB_SIZE, layout_keys, write_dataset
from tests.helpers.training import CurveProbe, Probe, train_on_ranks
from tools.datasets import batch_viewer

LAYOUTS = [
    {"tensor": 2},
    {"pipe": 2},
    {"data": 2},
    {"tensor": 2, "pipe": 2},
    {"tensor": 2, "data": 2},
    {"pipe": 2, "data": 2},
]
Share = tuple[str, int | None, int, torch.Tensor]
"""Global name, dimension that is split, tensor rank, values."""


@pytest.fixture(scope="module")
def data_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dataset")
    return {"data_path": str(write_dataset(folder / "text_document")), "index_cache_dir": str(folder / "index")}


class InitialWeights(Probe):
    """The rank's weights before the first step."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.shares: list[Share] = [
            (name, parameter_spec(parameter).shard_dim, self.tensor_rank, parameter.detach().clone())
            for name, parameter in engine.module.global_parameters()
        ]

    def result(self) -> list[Share]:
        return self.shares


@pytest.mark.parametrize(
    ("base", "layout"),
    [*zip([TOKENFORMER, PYTHIA] * 3, LAYOUTS, strict=True), (PYTHIA, {"tensor": 2}), (TOKENFORMER, {"pipe": 2})],
    ids=lambda value: value.get("architecture") or str(value),
)
def test_full_weights_are_those_of_the_seed(
    base: dict[str, Any], layout: dict[str, int], data_keys: dict[str, str], tmp_path: Path
) -> None:
    settings = base | data_keys | layout_keys(**layout) | {"train_iters": 1}
    found: dict[str, dict[int, torch.Tensor]] = {}
    split_dims: dict[str, int | None] = {}
    for shares in train_on_ranks(settings, tmp_path, math.prod(layout.values()), InitialWeights):
        for name, dim, tensor_rank, values in shares:
            split_dims[name] = dim
            # Data-parallel ranks, and the stages of a tied embedding, hold the same.
            assert torch.equal(values, found.setdefault(name, {}).setdefault(tensor_rank, values))
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(settings))
    run = load_config([config]).run
    whole = dict(build_local(run.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), run.training.seed).named_parameters())
    assert found.keys() == whole.keys()
    for name, by_rank in found.items():
        assert sorted(by_rank) == list(range(layout.get("tensor", 1)))
        shares, dim = [by_rank[rank] for rank in sorted(by_rank)], split_dims[name]
        if dim is None:
            assert all(torch.equal(share, whole[name]) for share in shares)
        else:
            assert torch.equal(torch.cat(shares, dim), whole[name])


class FinalWeights(Probe):
    """(data rank, tensor rank, the rank's weights after the last step by global name, which of them are split)."""

    def result(self) -> tuple[int, int, dict[str, torch.Tensor], set[str]]:
        parameters = dict(self.engine.module.global_parameters())
        split = {name for name, parameter in parameters.items() if parameter_spec(parameter).shard_dim is not None}
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        return self.data_rank, self.tensor_rank, weights, split


@pytest.mark.parametrize(
    ("base", "layout", "changes"),
    [
        (TOKENFORMER, {"tensor": 2, "pipe": 2}, {}),
        (TOKENFORMER, {"tensor": 2, "pipe": 2}, {"sequence_parallel": True, "precision": "bfloat16"}),
        (PYTHIA, {"tensor": 2, "data": 2}, {"sequence_parallel": True}),
        (PYTHIA, {"pipe": 2, "data": 2}, {"no_weight_tying": False, "precision": "bfloat16"}),
    ],
    ids=["tensor, pipe", "tensor, pipe, sequence, bf16", "tensor, data, sequence", "pipe, data, bf16"],
)
def test_replicas_stay_replicas(
    base: dict[str, Any], layout: dict[str, int], changes: dict[str, Any], data_keys: dict[str, str], tmp_path: Path
) -> None:
    """Weights that several ranks hold are the same bits after some steps with dropout."""
    settings = base | data_keys | layout_keys(**layout) | {"train_iters": 6, "hidden_dropout": 0.1} | changes
    holders: dict[tuple[str, int | None], list[torch.Tensor]] = {}
    for _, tensor_rank, weights, split in train_on_ranks(settings, tmp_path, 4, FinalWeights):
        for name, weight in weights.items():
            holders.setdefault((name, tensor_rank if name in split else None), []).append(weight)
    assert sum(len(copies) > 1 for copies in holders.values()) >= 3
    for name, copies in holders.items():
        assert all(torch.equal(copy, copies[0]) for copy in copies), name


class Tokens(Probe):
    """(pipe rank, data rank) and the rows [micro batch, seq_length + 1] that this rank reads, one by one."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.read: list[np.ndarray] = []

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for inputs, (labels, mask) in batches:
            assert torch.equal(inputs[:, 1:], labels[:, :-1])
            self.read.append(torch.cat([inputs, labels[:, -1:]], dim=1).numpy())
            yield inputs, (labels, mask)

    def result(self) -> tuple[int, int, list[np.ndarray]]:
        return self.pipe_rank, self.data_rank, self.read


@pytest.mark.parametrize(
    ("layout", "accumulation"),
    [({"data": 1}, 2), ({"data": 2}, 4), ({"data": 4}, 2), ({"data": 2, "tensor": 2}, 1), ({"data": 2, "pipe": 2}, 2)],
    ids=str,
)
def test_ranks_read_what_the_batch_viewer_shows(
    layout: dict[str, int], accumulation: int, data_keys: dict[str, str], tmp_path: Path
) -> None:
    steps, batch = 6, 8
    settings = TOKENFORMER | data_keys | layout_keys(**layout, batch=batch, accumulation=accumulation)
    # So few documents that the steps take more than one epoch.
    settings |= {"train_iters": steps, "split": "2, 90, 8"}
    ranks = train_on_ranks(settings, tmp_path, math.prod(layout.values()), Tokens)
    config, output = tmp_path / "config.yml", tmp_path / "batches.npy"
    del settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    config.write_text(yaml.safe_dump(settings | {"train_batch_size": batch}))
    batch_viewer.main([str(config), "--start", "1", "--end", str(steps), "--output", str(output)])
    want = np.load(output)
    assert want.shape == (steps, batch, SEQ_LENGTH + 1)
    data_size = layout["data"]
    readers = Counter((pipe_rank, data_rank) for pipe_rank, data_rank, _ in ranks)
    assert set(readers.values()) == {layout.get("tensor", 1)}
    for pipe_rank in range(layout.get("pipe", 1)):
        for replica in range(layout.get("tensor", 1)):
            by_data_rank = [
                [read for p, d, read in ranks if (p, d) == (pipe_rank, data_rank)][replica]
                for data_rank in range(data_size)
            ]
            rows = [micro for micros in zip(*by_data_rank, strict=True) for micro in micros]
            np.testing.assert_array_equal(np.concatenate(rows).reshape(want.shape), want)


class OptimizerState(CurveProbe):
    """Data rank, elements of the rank's weights, and of its master weights and moments by kind."""

    def result(self) -> tuple[int, int, dict[str, int]]:
        optimizer = self.engine.optimizer
        weights = sum(parameter.numel() for parameter in self.engine.module.parameters())
        masters = [master for group in optimizer.optimizer.param_groups for master in group["params"]]
        kept = {"master": sum(master.numel() for master in masters)}
        for moment in ("exp_avg", "exp_avg_sq"):
            kept[moment] = sum(optimizer.optimizer.state[master][moment].numel() for master in masters)
        return self.data_rank, weights, kept


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        ("fp32", {"data": 1}),
        ("fp32", {"data": 4}),
        ("fp32", {"data": 2, "tensor": 2}),
        ("bfloat16", {"data": 2}),
        ("bfloat16", {"data": 2, "pipe": 2}),
    ],
    ids=str,
)
def test_optimizer_state_is_partitioned(
    layout: dict[str, int], precision: str, data_keys: dict[str, str], tmp_path: Path
) -> None:
    settings = PYTHIA | data_keys | layout_keys(**layout) | {"train_iters": 1, "precision": precision}
    data_size = layout["data"]
    for _, weights, kept in train_on_ranks(settings, tmp_path, math.prod(layout.values()), OptimizerState):
        for elements in kept.values():
            # Each of the two parameter groups is padded to two elements per rank.
            assert weights / data_size <= elements <= weights / data_size + 4
