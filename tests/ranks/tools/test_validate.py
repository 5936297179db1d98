"""validate.py: the same loss for any layout, against the model's own logits in float64, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from megatron.checkpointing.states.read_states import read_weights
from megatron.data.datasets import validation_dataset
from megatron.model.causal_lm import build_local
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.runs import run_ranks
from tests.helpers.tiny_checkpoints import VOCAB, make_checkpoint, read_run, write_yaml

SAMPLES = 16
KEYS: dict[str, Any] = {"eval_iters": 2, "train_batch_size": 8, "mask_padded_vocab": True}


def measured(folder: Path, config: Path, *words: str, ranks: int = 1) -> dict[str, Any]:
    output = folder / f"{len(list(folder.glob('*.json')))}.json"
    finished = run_ranks(config, *words, f"eval_output={output}", ranks=ranks, script="tools.validate")
    assert finished.code == 0, finished.output
    found: dict[str, Any] = json.loads(output.read_text())
    assert f"validation loss {found['loss']:.4f}" in finished.output
    return found


@pytest.mark.parametrize("eod", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_loss_is_that_of_the_first_validation_samples(eod: bool, tmp_path: Path, dataset: Path) -> None:
    """In float64, whatever the layout; neither the number of steps nor an optimizer changes the samples."""
    keys = PYTHIA | KEYS | {"num_layers": 3, "data_path": str(dataset), "eod_mask_loss": eod}
    config = write_yaml(tmp_path, keys)
    checkpoint = make_checkpoint(config, tensor=2)
    run = read_run(config)
    model = build_local(checkpoint.config.model, VOCAB, seed=None).double().eval()
    model.load_state_dict({name: weight.double() for name, weight in read_weights(checkpoint).items()})
    samples = validation_dataset(run.data, SAMPLES, seq_length=16, seed=7, vocab_size=VOCAB.padded)
    tokens = torch.stack([torch.from_numpy(samples[item]) for item in range(SAMPLES)])
    with torch.no_grad():
        logits = model(tokens[:, :-1])[..., : VOCAB.actual]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    counted = (tokens[:, :-1] != 0).flatten() if eod else torch.ones(len(losses), dtype=torch.bool)
    assert not eod or int((~counted).sum()) > 0
    expected = float(losses[counted].mean())
    load = f"load={checkpoint.path}"
    one = measured(tmp_path, config, load)
    two = measured(tmp_path, config, load, "train_iters=700", "eval_interval=3", "model_parallel_size=2", ranks=2)
    assert one["loss"] == pytest.approx(expected, rel=1e-6) and two["loss"] == pytest.approx(expected, rel=1e-6)
    assert one["samples"] == SAMPLES and one["data"] == two["data"]
    assert (one["run_id"], one["iteration"]) == ("test", 7)


def test_the_model_is_the_checkpoints_and_shares_change_nothing(tmp_path: Path, dataset: Path) -> None:
    """A configuration of a smaller model measures its reference as well; two data-parallel ranks find the same."""
    keys = TOKENFORMER | KEYS | {"num_layers": 3, "data_path": str(dataset)}
    checkpoint = make_checkpoint(write_yaml(tmp_path, keys))
    smaller = tmp_path / "smaller.yml"
    smaller.write_text(yaml.safe_dump(keys | {"num_layers": 1, "eval_batch_size": 1}))
    one, two = (measured(tmp_path, smaller, f"load={checkpoint.path}", ranks=ranks) for ranks in (1, 2))
    assert one["loss"] == two["loss"] and one["data"] == two["data"]


def test_what_cannot_be_measured(tmp_path: Path, dataset: Path) -> None:
    keys = TOKENFORMER | KEYS | {"data_path": str(dataset)}
    config = write_yaml(tmp_path, keys)
    checkpoint = make_checkpoint(config)
    cases = {
        "split=1,0,0": "split: '1,0,0': no validation data is configured",
        "eval_iters=0": "eval_iters: 0: nothing is to be measured",
        "seq_length=32 max_position_embeddings=32": "is made for 16 tokens at most",
        f"load={tmp_path / 'none'}": "holds no checkpoint to read",
    }
    for words, message in cases.items():
        load = [] if words.startswith("load") else [f"load={checkpoint.path}"]
        finished = run_ranks(config, *words.split(), *load, script="tools.validate")
        assert finished.code in (1, 2) and message in finished.output, finished.output
        assert "Traceback" not in finished.output
