"""Dropout in training runs: replicated activations stay replicas, and recomputation draws the same numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.model.layer import HiddenDropout
from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.training import Curve, CurveProbe, train_on_ranks

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "train_iters": 4}


@pytest.fixture(scope="module")
def data_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("dataset")
    return {"data_path": str(write_dataset(folder / "text_document")), "index_cache_dir": str(folder / "index")}


class Dropped(CurveProbe):
    """The curve, and what every dropout of the residual stream returned on this rank, in order."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.outputs: list[torch.Tensor] = []
        for module in engine.module.modules():
            if isinstance(module, HiddenDropout):
                module.register_forward_hook(lambda module, inputs, output: self.outputs.append(output.detach()))

    def result(self) -> tuple[Curve, list[torch.Tensor]]:
        return self.curve, self.outputs


@pytest.mark.parametrize("base", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_replicated_activations_are_alike(
    base: dict[str, Any], recomputed: bool, data_keys: dict[str, str], tmp_path: Path
) -> None:
    settings = base | data_keys | layout_keys(tensor=2, accumulation=2) | DROPOUT
    settings |= {"checkpoint_activations": recomputed}
    (curve, first), (other_curve, second) = train_on_ranks(settings, tmp_path, 2, Dropped)
    assert curve == other_curve
    # One after the embedding and two in each of two layers, two micro batches, four steps. The layers' come again in
    # the backward pass when recomputed, but for the last of each, after which there is nothing to compute.
    assert len(first) == len(second) == (2 * 4 * (5 + 2) if recomputed else 2 * 4 * 5)
    assert all((ours == 0).any() for ours in first)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("base", "layout", "sequence_parallel"),
    [
        (TOKENFORMER, {}, False),
        (PYTHIA, {"tensor": 2}, False),
        (TOKENFORMER, {"tensor": 2}, True),
        (PYTHIA, {"pipe": 2}, False),
        (PYTHIA, {"tensor": 2, "pipe": 2}, True),
        (TOKENFORMER, {"data": 2, "pipe": 2}, False),
    ],
    ids=["alone", "tensor", "sequence", "pipe", "tensor, pipe, sequence", "data, pipe"],
)
def test_recomputation_changes_no_number(
    base: dict[str, Any], layout: dict[str, int], sequence_parallel: bool, data_keys: dict[str, str], tmp_path: Path
) -> None:
    settings = base | data_keys | layout_keys(**layout) | DROPOUT | {"sequence_parallel": sequence_parallel}
    ranks = math.prod(layout.values())
    kept, recomputed = (
        train_on_ranks(settings | {"checkpoint_activations": again}, tmp_path, ranks) for again in (False, True)
    )
    assert len(kept[0]) == 4
    assert kept == recomputed
