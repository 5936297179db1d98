"""Training starts from an imported Hugging Face folder in any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.hf.import_folder import import_folder
from tests.helpers.runs import train
from tests.helpers.tiny_checkpoints import MODELS, export, whole_model


@pytest.mark.parametrize(("name", "tensor", "pipe"), [("tokenformer", 2, 1), ("pythia", 1, 2)])
def test_training_starts_from_imported_weights_in_any_layout(
    name: str, tensor: int, pipe: int, request: pytest.FixtureRequest, dataset: Path, tmp_path: Path
) -> None:
    """The first step's learning rate is 0, so what it saves are the weights that it has loaded."""
    checkpoint: Checkpoint = request.getfixturevalue(name)
    import_folder(export(checkpoint, tmp_path / "hf"), checkpoint.config, tmp_path / "imported")
    settings = MODELS["l2_norm_gelu" if name == "tokenformer" else name] | {
        "make_vocab_size_divisible_by": 100,
        "data_path": str(dataset),
        "train_iters": 1,
        "eval_iters": 0,
        "model_parallel_size": tensor,
        "pipe_parallel_size": pipe,
        "load": str(tmp_path / "imported"),
        "finetune": True,
        "save": str(tmp_path / "run"),
    }
    config = tmp_path / "tuned.yml"
    config.write_text(yaml.safe_dump(settings))
    train(config, ranks=2)
    saved = find_checkpoint(tmp_path / "run", None, "full")
    assert saved is not None
    assert (saved.state.iteration, saved.state.tensor_parallel_size, saved.state.pipe_parallel_size) == (
        1,
        tensor,
        pipe,
    )
    got = read_weights(saved)
    for parameter, want in whole_model(checkpoint.config).state_dict().items():
        assert torch.equal(got[parameter], want), parameter
