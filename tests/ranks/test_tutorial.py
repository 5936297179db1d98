"""The tutorial, as it stands: published weights are imported, finetuned, grown, exported and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.monitor.metrics_file import read_records
from tests.helpers.documentation import Command, steps
from tests.helpers.documented_folder import DocumentedFolder
from tests.helpers.neox_writer import our_weights

PAGE = "docs/tutorial.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of somebody who has followed the page, and what the programs have printed last, by their names."""
    folder = DocumentedFolder(tmp_path_factory.mktemp("tutorial") / "reader")
    printed = {}
    for step in steps(PAGE):
        if not isinstance(step, Command):
            folder.follow(step)
        elif step.reason is None:
            printed[step.words[1]] = folder.follow(step)
    return folder.folder, printed


def weights(run: Path, iteration: int | None = None) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run, iteration, "full")
    assert checkpoint is not None
    return read_weights(checkpoint)


def score(path: Path) -> float:
    results: dict[str, Any] = json.loads(path.read_text())["results"]
    value: float = results["my_text"]["bits_per_byte,none"]
    return value


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_recipe_ends_with_a_better_model_of_twice_the_tokens(followed: tuple[Path, dict[str, str]]) -> None:
    folder, printed = followed
    published = torch.load(folder / "published" / "pytorch_model.bin", weights_only=True)
    named = our_weights({name.removeprefix("sequential."): tensor for name, tensor in published.items()}, 4)
    imported = weights(folder / "runs" / "published")
    assert imported.keys() == named.keys()
    assert all(torch.equal(imported[name], tensor) for name, tensor in named.items())
    assert named["layers.0.mlp.key_tokens"].shape[0] == 3072, "as many tokens as published"

    finetuned = weights(folder / "runs" / "finetuned", 60)
    assert "logits change by at most 0.0e+00 of the largest" in printed["tools/ckpts/grow.py"]
    started = weights(folder / "runs" / "grown", 60)
    for name, tensor in finetuned.items():
        assert torch.equal(started[name][: len(tensor)], tensor), name
        assert not started[name][len(tensor) :].any() or not name.endswith("key_tokens"), "new keys are zero"
    trained = weights(folder / "runs" / "grown", 120)
    assert trained["layers.0.mlp.key_tokens"].shape[0] == 6144
    assert trained["layers.0.mlp.key_tokens"][3072:].any(), "and they learn"

    losses = [
        row["valid/lm_loss"]
        for row in read_records(folder / "runs" / "finetuned" / "metrics.jsonl")
        if "valid/lm_loss" in row
    ]
    later = [
        row["valid/lm_loss"]
        for row in read_records(folder / "runs" / "grown" / "metrics.jsonl")
        if "valid/lm_loss" in row
    ]
    assert later[-1] < losses[-1] < losses[0]

    tensors = load_file(folder / "exports" / "grown" / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in trained.values())
    (theirs,) = (folder / "exported").rglob("results_*.json")
    assert score(folder / "after.json") == pytest.approx(score(theirs), rel=1e-6)
    assert score(folder / "after.json") < score(folder / "before.json")
