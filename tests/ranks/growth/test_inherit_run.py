"""Runs that begin with layers of a reference: in any layout, with or without the optimizer's state, and by the tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from tests.helpers.configs import TOKENFORMER, layout_keys, write_dataset
from tests.helpers.runs import run_ranks
from tools.ckpts import inherit

STEPS = 4
REFERENCE: dict[str, Any] = TOKENFORMER | {
    "num_layers": 3, "train_iters": 2 * STEPS, "eval_interval": STEPS, "qkv_scale_base": 12, "weight_decay": 0.0,
}  # fmt: skip
SMALL = REFERENCE | {"num_layers": 2, "extra_save_iters": [0]}


class Folder:
    """A trained reference of two tensor-parallel ranks, and configurations of runs that inherit from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = {"data_path": str(write_dataset(path / "text")), "index_cache_dir": str(path / "index")}
        assert run_ranks(self.config("reference", REFERENCE, 2, 1), f"exit_interval={STEPS}", ranks=2).code == 75
        self.reference = read_checkpoint(path / "reference" / f"global_step{STEPS}")

    def config(self, name: str, keys: dict[str, Any], tensor: int = 1, pipe: int = 1, **more: Any) -> Path:
        path = self.path / f"{name}.yml"
        layout = layout_keys(tensor, pipe) | {"eval_iters": 1}
        path.write_text(yaml.safe_dump(keys | layout | self.data | {"save": str(self.path / name)} | more))
        return path

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("inherit"))


def assert_inherited(made: Checkpoint, reference: Checkpoint, *, moments: bool) -> None:
    theirs = {layer.name: layer for layer in read_states(reference)}
    ours = {layer.name: layer for layer in read_states(made)}
    assert list(ours) == ["embedding", "layers.0", "layers.1", "final_norm"]
    for name, layer in ours.items():
        for local, state in layer.parameters.items():
            wanted = theirs[name][local]
            assert torch.equal(state.weight, wanted.weight) and state.master is not None
            assert torch.equal(state.master, wanted.weight if wanted.master is None else wanted.master)
            if moments:
                assert state.step == wanted.step == STEPS
                assert all(torch.equal(state.moments[key], wanted.moments[key]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("layout", [(2, 1), pytest.param((1, 2), marks=pytest.mark.full)])
def test_a_run_begins_with_the_references_layers_bit_for_bit(layout: tuple[int, int], folder: Folder) -> None:
    """Weights alone, at its own step 0, with a fresh optimizer."""
    name = f"fresh {layout}"
    keys = SMALL | {"load": str(folder.path / "reference"), "finetune": True, "inherit": {"layers": "first"}}
    assert run_ranks(folder.config(name, keys, *layout), ranks=2).code == 0
    made = read_checkpoint(folder.path / name / "global_step0")
    assert_inherited(made, folder.reference, moments=False)
    assert (made.state.consumed_train_samples, made.state.training_flops) == (0, 0.0)
    assert made.config.inherit is not None and made.config.checkpoint.load == str(folder.path / "reference")
    assert [row["iteration"] for row in folder.rows(name) if "train/lm_loss" in row] == list(range(1, 2 * STEPS + 1))


def test_moments_are_kept_and_the_run_begins_at_its_own_first_step(folder: Folder) -> None:
    """In another layout; and a checkpoint of the tool is where the same run goes on from."""
    keys = SMALL | {"load": str(folder.path / "reference"), "inherit": {"moments": "keep"}, "auto_resume": True}
    assert run_ranks(folder.config("kept", keys, 1, 2), "exit_interval=2", ranks=2).code == 75
    made = read_checkpoint(folder.path / "kept" / "global_step0")
    assert_inherited(made, folder.reference, moments=True)
    assert run_ranks(folder.config("kept", keys, 1, 2), ranks=2).code == 0, "resumed from its own checkpoint"
    steps = [row["iteration"] for row in folder.rows("kept") if "train/lm_loss" in row]
    assert steps == list(range(1, 2 * STEPS + 1))
    assert folder.rows("kept")[0]["train/learning_rate"] == 0.0, "the schedule begins with its warmup"
    config = folder.config("by tool", keys, 1, 2)
    words = ["--input_dir", str(folder.path / "reference"), "--output_dir", str(folder.path / "by tool")]
    assert inherit.main([*words, "--config_file", str(config)]) == 0
    assert run_ranks(config, ranks=2).code == 0
    last = f"global_step{2 * STEPS}"
    for checkpoint in (last, "global_step0"):
        ours, theirs = (read_checkpoint(folder.path / name / checkpoint) for name in ("by tool", "kept"))
        for one, other in zip(read_states(ours), read_states(theirs), strict=True):
            for local in one.parameters:
                assert torch.equal(one[local].weight, other[local].weight), (checkpoint, one.name, local)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, "a model of 5 layers needs 5 layers of the reference, which has 3"),
        ({"inherit": {"layers": [0, 7]}}, "0 to 2; it has no 7"),
        ({"hidden_size": 64, "num_attention_heads": 8}, "hidden_size: reference 32, configuration 64"),
        ({"make_vocab_size_divisible_by": 600}, "padded to 512, this run one of 512 padded to 600"),
    ],
)
def test_a_run_that_cannot_inherit_ends_before_it_writes(changes: dict[str, Any], message: str, folder: Folder) -> None:
    keys = SMALL | {"load": str(folder.path / "reference"), "finetune": True, "inherit": {"layers": "first"}}
    finished = run_ranks(folder.config("refused", keys | changes))
    assert finished.code in (1, 2) and message in finished.output and "Traceback" not in finished.output
    assert not list((folder.path / "refused").glob("global_step*"))
