"""Growth by the next layers of a reference: which they are, what stays, and which references are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.errors import CheckpointError, ConfigError, UserError
from megatron.growth.grow_checkpoint import plan_growth
from megatron.growth.growth_operator import grown_layers
from megatron.growth.layer_reader import LayerReader
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import make_checkpoint, write_yaml
from tools.ckpts import grow, inherit


class Folder:
    """A reference of five layers, and a model of its first two."""

    def __init__(self, path: Path, dataset: Path, keys: dict[str, Any]) -> None:
        self.path = path
        self.keys = keys | {"num_layers": 5, "data_path": str(dataset)}
        self.reference = make_checkpoint(write_yaml(path, self.keys), tensor=2, pipe=2)
        words = ["--input_dir", str(self.reference.path), "--output_dir", str(path / "two"), "--num_layers", "2"]
        assert inherit.main(words) == 0
        self.two = read_checkpoint(path / "two" / "global_step0")

    def append(self, layers: int, reference: Path | None = None) -> Checkpoint:
        output = self.path / f"{layers}"
        folders = ["--input_dir", str(self.two.path), "--output_dir", str(output)]
        rules = ["--operator", "append", "--reference", str(reference or self.reference.path)]
        assert grow.main([*folders, *rules, "--num_layers", str(layers)]) == 0
        return read_checkpoint(output / "global_step0")


@pytest.fixture
def folder(tmp_path: Path, dataset: Path) -> Folder:
    return Folder(tmp_path, dataset, TOKENFORMER | {"ffn_scale_base": 16})


@pytest.mark.parametrize("keys", [PYTHIA, TOKENFORMER], ids=["gpt_neox", "tokenformer"])
def test_new_layers_are_the_references_next_ones(keys: dict[str, Any], tmp_path: Path, dataset: Path) -> None:
    """Inheriting two layers and appending two is inheriting four."""
    folder = Folder(tmp_path, dataset, keys)
    theirs, ours = read_weights(folder.reference), read_weights(folder.append(4))
    assert {name.split(".")[1] for name in ours if name.startswith("layers.")} == {"0", "1", "2", "3"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    grown = read_checkpoint(folder.path / "4" / "global_step0").state.growth[0]
    assert grown.new_layers == (2, 3) and grown.rules.reference == str(folder.reference.path)


def test_trained_layers_keep_their_moments_and_new_ones_have_none(folder: Folder) -> None:
    config = folder.two.config
    larger = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 3})})
    rules = grow.GrowthRules(operator="append", reference=str(folder.reference.path))
    growth = plan_growth(folder.two, larger, rules)
    reader = LayerReader(folder.two)

    def read(name: str) -> LayerState:
        """As after some training: other weights, and moments."""
        layer = reader.read(name)
        trained = {
            local: ParameterState(state.weight + 1, state.weight + 1, {"exp_avg": state.weight + 2}, 5.0)
            for local, state in layer.parameters.items()
        }
        return layer.replace(trained)

    theirs = read_weights(folder.reference)
    layers = {layer.name: layer for layer in grown_layers(read, growth)}
    assert list(layers) == ["embedding", "layers.0", "layers.1", "layers.2", "final_norm"]
    for layer in layers.values():
        for name, state in layer.by_global_name():
            is_new = name.startswith("layers.2.")
            assert state.master is not None and torch.equal(state.weight, state.master)
            assert torch.equal(state.weight, theirs[name] + (0 if is_new else 1)), name
            assert torch.equal(state.moments["exp_avg"], torch.zeros_like(state.weight) if is_new else theirs[name] + 2)
            assert state.step == 5.0


def test_references_that_do_not_fit(folder: Folder, dataset: Path) -> None:
    other = folder.path / "other"
    other.mkdir()
    foreign = make_checkpoint(write_yaml(other, folder.keys | {"ffn_scale_base": 48}))
    damaged = make_checkpoint(write_yaml(other, folder.keys | {"save": str(other / "damaged")}))
    (damaged.path / "manifest.json").unlink()
    cases: list[tuple[int, Path | None, type[UserError], str]] = [
        (6, None, ConfigError, r"num_layers: 6 layers are asked for, and .* has 5. Use 5 or fewer"),
        (3, foreign.path, ConfigError, r"grow.reference: .* is another model than the run's: param_tokens"),
        (3, damaged.path.parent, CheckpointError, "holds no whole checkpoint"),
        (3, damaged.path, CheckpointError, "cannot be loaded"),
        (3, other / "nothing", CheckpointError, "holds no whole checkpoint"),
    ]
    for layers, reference, error, message in cases:
        with pytest.raises(error, match=message):
            folder.append(layers, reference)
        assert not (folder.path / f"{layers}").exists()
    with pytest.raises(ConfigError, match=r"grow.reference: append adds layers of a deeper model"):
        grow.main(["--input_dir", str(folder.two.path), "--output_dir", str(other / "x"), "--operator", "append",
                   "--num_layers", "3"])  # fmt: skip
