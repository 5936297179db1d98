"""`--hf_model` with damaged and hostile files is refused in one line, and nothing in them runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import ConfigError
from megatron.inference.evaluation.huggingface_model import load_hf_model
from tests.helpers.bombs import Bomb
from tests.helpers.hostile_pickles import saved

DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "a bomb": lambda trace: saved({"a": Bomb(trace)}),
    "an old bomb": lambda trace: saved({"a": Bomb(trace)}, archive=False),
    "no weights": lambda trace: b"weights",
    "nothing": lambda trace: b"",
    "no tensors": lambda trace: saved({"model.norm.weight": "x"}),
    "cut off": lambda trace: saved({"model.norm.weight": torch.zeros(1000)})[:-100],
}


def refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_hf_model(EvaluationConfig(hf_model=str(folder)))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"eval_hf_model: {folder} cannot be loaded: ")


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_are_none(kind: str, eval_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(eval_export, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(DAMAGE[kind](tmp_path / "exploded"))
    refused(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", "weights"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "[3]"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "gpt2", "pad_token_id": [1.5]}'),
    ],
)
def test_other_files_that_are_none(name: str, content: str, eval_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(eval_export, tmp_path / "model")
    (folder / name).write_text(content)
    refused(folder)
