"""Checkpoints of every layout to Hugging Face folders and back."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.tensor_folder import open_folder
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.hf.import_folder import import_folder
from tests.helpers.tiny_checkpoints import (
    MODELS,
    export,
    make_checkpoint,
    read_run,
    tokens,
    whole_model,
    write_yaml,
)

Case = tuple[int, int, bool, str]
FACTORS = ((1, 2), (1, 2), (True, False), tuple(MODELS))
ALL: list[Case] = list(itertools.product(*FACTORS))
PAIRWISE: list[Case] = [
    (1, 1, True, "l2_norm_gelu"), (2, 2, False, "l2_norm_gelu"), (1, 2, False, "gelu_l2_norm"),
    (2, 1, True, "gelu_l2_norm"), (2, 1, False, "softmax"), (1, 2, True, "softmax"), (1, 1, False, "pythia"),
    (2, 2, True, "pythia"), (2, 2, True, "gpt2"), (2, 2, False, "llama"),
]  # fmt: skip


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    found = open_folder(folder)
    return found.read(found.files)


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize(
    ("tensor", "pipe", "tied", "name"),
    [case if case in PAIRWISE else pytest.param(*case, marks=pytest.mark.full) for case in ALL],
)
def test_every_layout_exports_and_comes_back(tensor: int, pipe: int, tied: bool, name: str, tmp_path: Path) -> None:
    settings = MODELS[name] | {"no_weight_tying": not tied}
    config = write_yaml(tmp_path, settings)
    run = read_run(config)
    folder = export(make_checkpoint(config, tensor=tensor, pipe=pipe), tmp_path / "hf")

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
        torch.testing.assert_close(logits, whole_model(run)(tokens()), rtol=0, atol=1e-5)

    import_folder(folder, run, tmp_path / "imported")
    imported = find_checkpoint(tmp_path / "imported", None, "full")
    assert imported is not None
    assert_same_tensors(read_weights(imported), whole_model(run).state_dict())
    again = export(imported, tmp_path / "again")
    assert_same_tensors(folder_tensors(again), folder_tensors(folder))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (again / file).read_text() == (folder / file).read_text()
