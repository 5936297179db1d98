"""The command that grows a checkpoint, and the runs before and after it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.checkpointing.store.find_checkpoint import newest_checkpoint
from megatron.errors import CheckpointError
from megatron.growth.grow_checkpoint import plan_growth
from megatron.growth.growth_operator import GROWTH_OPERATORS, grown_layers
from tests.helpers.configs import TOKENFORMER, layout_keys, write_dataset
from tests.helpers.runs import run_ranks
from tests.helpers.tiny_checkpoints import make_checkpoint, write_yaml
from tools.ckpts import grow

STEPS = 4
SMALL = TOKENFORMER | {"train_iters": 2 * STEPS, "eval_iters": 1, "eval_interval": STEPS}
TOKENS = {"qkv_slot_num": 32, "ffn_slot_num": 64}
LARGE = SMALL | TOKENS | {"qkv_scale_base": 24, "ffn_scale_base": 48}


class Folder:
    """A trained small model, and configurations for what comes after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = {"data_path": str(write_dataset(path / "text")), "index_cache_dir": str(path / "index")}
        assert run_ranks(self.config("small", SMALL, 2, 1), f"exit_interval={STEPS}", ranks=2).code == 75

    def config(self, name: str, keys: dict[str, Any], tensor: int, pipe: int) -> Path:
        path = self.path / f"{name}.yml"
        layout = layout_keys(tensor, pipe) | {"eval_iters": 1}
        path.write_text(yaml.safe_dump(keys | layout | self.data | {"save": str(self.path / name)}))
        return path

    def grow(self, name: str, keys: dict[str, Any], *words: str) -> int:
        config = self.config(name, keys, 1, 2)
        folders = ["--input_dir", str(self.path / "small"), "--output_dir", str(self.path / name)]
        return grow.main([*folders, "--config_file", str(config), *words])

    def losses(self, name: str, key: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.path / name / "metrics.jsonl").read_text().splitlines()]
        return {row["iteration"]: row[key] for row in rows if key in row}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("grow"))


def test_a_grown_run_goes_on_as_if_nothing_had_happened(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """In another layout, from the next step on: the first loss after growth is the small model's."""
    assert folder.grow("grown", LARGE, "seed=3") == 0
    sizes = [512 * 32 + 2 * 2 * 32 * tokens + 2 * 32 for tokens in (3 * 24 + 40 + 48, 3 * 32 + 40 + 64)]
    assert f"grown by zero_key from {sizes[0]:,} to {sizes[1]:,} parameters" in capsys.readouterr().out
    assert run_ranks(folder.config("grown", LARGE, 1, 2), "auto_resume=true", ranks=2).code == 0
    small = folder.config("ungrown", SMALL, 1, 1)
    assert run_ranks(small, f"load={folder.path / 'small'}").code == 0
    grown, ungrown = (folder.losses(name, "train/lm_loss") for name in ("grown", "ungrown"))
    assert sorted(grown) == sorted(ungrown) == list(range(STEPS + 1, 2 * STEPS + 1))
    assert grown[STEPS + 1] == pytest.approx(ungrown[STEPS + 1], abs=1e-6)
    assert grown[2 * STEPS] != ungrown[2 * STEPS], "new keys learn"


RULES: dict[str, list[str]] = {
    "mask_ramp": ["--ramp_iters", "4"],
    "copy": ["--perturb", "0.1"],
    "shrink_perturb": ["--shrink", "0.8"],
    "published": ["--moments", "reset_all", "--schedule", "restart"],
}


@pytest.mark.parametrize("operator", list(GROWTH_OPERATORS))
def test_every_operator_reads_and_writes_moments_of_any_layout(operator: str, folder: Folder) -> None:
    """From two tensor-parallel ranks, for two by two of them and for one rank: what comes back is the same, and is what
    the operator makes of the whole layers."""
    words = ["--factor", "2", "--operator", operator, *RULES.get(operator, [])]
    if operator == "append":
        keys = SMALL | folder.data | {"num_layers": 4}
        (folder.path / "deep").mkdir()
        words += ["--reference", str(make_checkpoint(write_yaml(folder.path / "deep", keys)).path)]
    layouts = {"one": layout_keys(), "four": layout_keys(2, 2)}
    grown = []
    for name, keys in layouts.items():
        config = folder.path / f"{name}.yml"
        config.write_text(yaml.safe_dump(SMALL | keys | folder.data))
        output = folder.path / f"{operator} {name}"
        folders = ["--input_dir", str(folder.path / "small"), "--output_dir", str(output)]
        assert grow.main([*folders, "--config_file", str(config), *words]) == 0
        grown.append(read_checkpoint(output / f"global_step{STEPS}"))
    state = grown[1].state
    assert (state.tensor_parallel_size, state.pipe_parallel_size) == (2, 2)
    source = newest_checkpoint(folder.path / "small", "full")
    growth = plan_growth(source, grown[0].config, state.growth[0].rules)
    assert growth.record == state.growth[0]
    whole = {layer.name: layer for layer in read_states(source)}
    fresh = operator == "published"
    for expected, one, four in zip(
        grown_layers(whole.__getitem__, growth), *map(read_states, grown), strict=True
    ):  # fmt: skip
        assert expected.name == one.name == four.name
        for name, wanted in expected.parameters.items():
            for state_of in (one[name], four[name]):
                assert wanted.master is not None and state_of.master is not None
                assert torch.equal(wanted.master, state_of.master) and torch.equal(wanted.master, state_of.weight)
                assert state_of.step == wanted.step == (0 if fresh else STEPS)
                assert state_of.moments.keys() == {"exp_avg", "exp_avg_sq"}
                assert all(torch.equal(wanted.moments[key], moment) for key, moment in state_of.moments.items())
                assert not fresh or not any(moment.any() for moment in state_of.moments.values())


def test_bf16_is_measured_by_its_masters(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A third of a value is no bf16 number, so the rounded weights would break the promise of copies."""
    low = folder.config("bf16", SMALL | {"precision": "bfloat16"}, 1, 1)
    words = ["--config_file", str(low), "--operator", "copy", "--factor", "3", "--output_dir"]
    assert grow.main(["--input_dir", str(folder.path / "small"), *words, str(folder.path / "bf16")]) == 0
    assert grow.main(["--input_dir", str(folder.path / "bf16"), *words, str(folder.path / "bf16 again")]) == 0
    changes = re.findall(r"change by at most (\S+) of the largest", capsys.readouterr().out)
    assert len(changes) == 2 and all(0 < float(change) <= 1e-5 for change in changes)
    for layer in read_states(read_checkpoint(folder.path / "bf16 again" / f"global_step{STEPS}")):
        for state in layer.parameters.values():
            assert state.master is not None and state.weight.dtype == torch.bfloat16
            assert torch.equal(state.weight, state.master.bfloat16())


def larger_keys(checkpoint: Path) -> dict[str, Any]:
    """The keys that describe a checkpoint's sizes and scales."""
    model = read_checkpoint(checkpoint).config.model
    tokens = model.param_tokens
    assert tokens is not None
    sizes = {f"{field}_slot_num": getattr(tokens, field) for field in ("qkv", "proj", "ffn")}
    scales = {f"{field}_scale_base": getattr(tokens, f"{field}_scale_base") for field in ("qkv", "proj", "ffn")}
    return sizes | scales | {"num_layers": model.num_layers}


def test_a_folded_ramp_is_what_training_computes_with(folder: Folder) -> None:
    """A run in the middle of its ramp goes on, and so does one that is grown once more there, which folds the ramp: the
    next loss is the same."""
    half = STEPS + STEPS // 2
    source = folder.path / "small"
    for name, words in (("ramp", ["--operator", "mask_ramp", "--ramp_iters", str(STEPS)]), ("folded", [])):
        output = folder.path / name
        layout = folder.config("layout", SMALL, 1, 1)
        grown = ["--input_dir", str(source), "--config_file", str(layout), "--factor", "2", "--output_dir", str(output)]
        assert grow.main([*grown, *words]) == 0
        config = folder.config(name, SMALL | larger_keys(output / (output / "latest").read_text().strip()), 1, 1)
        if name == "ramp":
            assert run_ranks(config, "auto_resume=true", f"exit_interval={STEPS // 2}").code == 75
            source = folder.path / "mid ramp"
            shutil.copytree(output, source)
        assert run_ranks(config, "auto_resume=true").code == 0
    ramp, folded = (folder.losses(name, "train/lm_loss") for name in ("ramp", "folded"))
    assert sorted(ramp) == list(range(STEPS + 1, 2 * STEPS + 1)) and sorted(folded) == [half + 1, half + 2]
    assert folded[half + 1] == pytest.approx(ramp[half + 1], abs=1e-6)
    state = read_checkpoint(source / f"global_step{half}").state
    assert state.growth[0].score_multiplier(half) == 0.5


@pytest.mark.parametrize("operator", ["insert", pytest.param("copy", marks=pytest.mark.full)])
def test_training_goes_on_in_tensor_and_pipeline_parallel(operator: str, folder: Folder) -> None:
    """On two by two ranks, from the first loss of the small model on; a restarted schedule begins with its warmup."""
    name = f"trained {operator}"
    source, output = str(folder.path / "small"), folder.path / name
    words = ["--operator", operator, "--factor", "2", "--schedule", "restart", "--output_dir", str(output)]
    small = folder.config(name, SMALL, 2, 2)
    assert grow.main(["--input_dir", source, "--config_file", str(small), *words]) == 0
    keys = larger_keys(output / f"global_step{STEPS}")
    large = folder.config(name, SMALL | keys, 2, 2)
    assert run_ranks(large, "auto_resume=true", ranks=4).code == 0
    ungrown = folder.config("ungrown", SMALL, 1, 1)
    if not (folder.path / "ungrown").exists():
        assert run_ranks(ungrown, f"load={folder.path / 'small'}").code == 0
    losses, others = (folder.losses(run, "train/lm_loss") for run in (name, "ungrown"))
    assert losses[STEPS + 1] == pytest.approx(others[STEPS + 1], abs=1e-5)
    rates = folder.losses(name, "train/learning_rate")
    assert rates[STEPS + 1] < rates[STEPS + 2] < 1e-3


def test_a_checkpoint_is_not_grown_into_its_own_folder(folder: Folder) -> None:
    config = folder.config("small", LARGE, 1, 1)
    with pytest.raises(CheckpointError, match="Name another folder"):
        grow.main([
            "--input_dir", str(folder.path / "small"), "--output_dir", str(folder.path / "small"),
            "--config_file", str(config),
        ])  # fmt: skip
