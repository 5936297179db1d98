"""Training through the command line against a float64 loop that shares nothing with the engine but initial weights.

They come from the run's checkpoint of step 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.plain_torch import PlainRun, Weights
from tests.helpers.records import records

STEPS = 30


def initial_weights(run: Path, settings: dict[str, Any]) -> Weights:
    layers = [f"layers.{i}" for i in range(settings["num_layers"])]
    names = ["embedding", *layers, "final_norm", *(["head"] if settings.get("no_weight_tying") else [])]
    weights: Weights = {}
    for layer, name in enumerate(names):
        file = run / "global_step0" / f"layer_{layer:02d}-model_00-model_states.pt"
        weights |= {f"{name}.{local}": tensor for local, tensor in torch.load(file, weights_only=True).items()}
    return weights


@pytest.mark.parametrize("settings", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
def test_losses_and_norms_follow_a_float64_loop(
    settings: dict[str, Any], request: pytest.FixtureRequest, dataset: Path
) -> None:
    run: Path = request.getfixturevalue("pythia_run" if settings is PYTHIA else "tokenformer_run")
    batch = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    expected = list(PlainRun(settings, batch, STEPS).follow(initial_weights(run, settings), dataset))
    losses, norms = records(run, "train/lm_loss"), records(run, "train/grad_norm")
    assert list(losses) == list(range(1, STEPS + 1))
    assert list(losses.values()) == pytest.approx([loss for loss, _ in expected], abs=1e-6, rel=0)
    assert list(norms.values()) == pytest.approx([norm for _, norm in expected], abs=1e-5, rel=0)
    assert max(norms.values()) > 1.0, "clipping was never active"
    assert expected[-1][0] < expected[0][0] - 0.1, "nothing was learned"
