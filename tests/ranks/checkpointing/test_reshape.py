"""Checkpoints rewritten for another layout, held against those that DeepSpeed's engine writes in it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.manifest import describe_file, write_manifest
from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys, write_dataset
from tests.helpers.covers import pairwise_cover
from tests.helpers.runs import run_ranks
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

Layout = tuple[int, int, int]
STEP = "global_step3"
MODELS = {
    "tokenformer": TOKENFORMER | {"no_weight_tying": False},
    # Odd sizes: pieces of the data-parallel ranks end within parameters, and in padding.
    "pythia": PYTHIA | {"hidden_size": 36, "pipe_partition_method": "parameters", "num_layers": 3},
}


class Checkpoints:
    """What training wrote in each layout and precision, and configurations for the tool."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}

    def config(self, name: str, keys: dict[str, Any], layout: Layout) -> Path:
        path = self.folder / f"{name}.yml"
        settings = self.data | {"save": str(self.folder / name), "train_iters": 3, "extra_save_iters": [0]}
        path.write_text(yaml.safe_dump(keys | layout_keys(*layout) | settings))
        return path

    def trained(self, model: str, layout: Layout, **changes: Any) -> Path:
        name = "-".join(map(str, (model, *layout, *changes.values())))
        if not (self.folder / name).exists():
            tensor, pipe, data = layout
            config = self.config(name, MODELS[model] | changes, layout)
            assert run_ranks(config, ranks=tensor * pipe * data).code == 0
        return self.folder / name

    def reshaped(self, source: Path, output: Path, model: str, layout: Layout, **changes: Any) -> Path:
        config = self.config(f"for-{output.name}", MODELS[model] | changes, layout)
        tensor, pipe, data = layout
        ranks = ["--ranks", str(tensor * pipe * data)]
        folders = ["--input_dir", str(source), "--config_file", str(config), "--output_dir", str(output)]
        assert reshape.main([*folders, *ranks]) == 0
        return output


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("model", MODELS)
def test_to_one_process_and_back_is_bit_identical(model: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Weights and moments, in every file; and the way back is to files that DeepSpeed wrote itself."""
    source = checkpoints.trained(model, (2, 2, 1))
    single = checkpoints.reshaped(source, tmp_path / "single", model, (1, 1, 1))
    assert len(list((single / STEP).glob("*optim_states.pt"))) == 1
    back = checkpoints.reshaped(single, tmp_path / "back", model, (2, 2, 1))
    assert_same_checkpoint(back / STEP, source / STEP)


CASES = list(product(MODELS, [(2, 1, 2), (1, 2, 2)], ["fp32", "bfloat16"]))
COVER = pairwise_cover(CASES, list)


@pytest.mark.parametrize(
    ("model", "layout", "precision"),
    [pytest.param(*case, marks=[] if case in COVER else pytest.mark.full) for case in CASES],
)
def test_files_are_those_of_the_engine(
    model: str, layout: Layout, precision: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """All that a file holds but the engine's configuration, which nothing reads."""
    source = checkpoints.trained(model, layout, precision=precision)
    single = checkpoints.reshaped(source, tmp_path / "single", model, (1, 1, 1), precision=precision)
    back = checkpoints.reshaped(single, tmp_path / "back", model, layout, precision=precision)
    for step in (STEP, "global_step0"):
        if step == "global_step0":
            back = checkpoints.reshaped(source / step, tmp_path / "start", model, layout, precision=precision)
        assert_same_checkpoint(back / step, source / step)
        for file in (source / step).glob("*.pt"):
            assert plain(torch.load(back / step / file.name, weights_only=False)) == plain(
                torch.load(file, weights_only=False)
            ), file.name


def plain(content: Any) -> Any:
    """What a file holds, with tensors as their shapes and objects as their attributes."""
    if isinstance(content, torch.Tensor):
        return content.dtype, tuple(content.shape)
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items() if key != "ds_config"}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return vars(content) if hasattr(content, "cur_scale") else content


def test_another_precision_keeps_the_masters(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints.trained("tokenformer", (1, 2, 2), precision="bfloat16")
    exact = checkpoints.reshaped(source, tmp_path / "exact", "tokenformer", (2, 1, 1), precision="fp32")
    back = checkpoints.reshaped(exact, tmp_path / "back", "tokenformer", (1, 2, 2), precision="bfloat16")
    assert_same_checkpoint(back / STEP, source / STEP)
    layer = torch.load(exact / STEP / "layer_01-model_00-model_states.pt", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in layer.values())
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in layer.values())


def test_fp16_starts_with_its_loss_scale_and_keeps_it(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Against DeepSpeed's scaler, made from the same settings; its engine trains in fp16 on GPUs alone."""
    source = checkpoints.trained("tokenformer", (2, 2, 1))
    fp16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 9, "hysteresis": 3, "min_loss_scale": 2}}
    half = checkpoints.reshaped(source, tmp_path / "half", "tokenformer", (1, 1, 2), **fp16)
    file = half / STEP / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    scaler = content["optimizer_state_dict"]["loss_scaler"]
    expected = DynamicLossScaler(2**9, 1000, 2, 3, consecutive_hysteresis=False)
    assert vars(scaler) == vars(expected)
    assert content["optimizer_state_dict"]["dynamic_loss_scale"] is True
    layer = torch.load(half / STEP / "layer_01-model_00-model_states.pt", weights_only=True)
    assert all(weight.dtype == torch.float16 for weight in layer.values())

    back = checkpoints.reshaped(half, tmp_path / "back", "tokenformer", (2, 2, 1))
    assert_same_checkpoint(back / STEP, source / STEP)
    for path in (half / STEP).glob("zero*"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["loss_scaler"].cur_scale = 64.0
        torch.save(content, path)
    checkpoint = read_checkpoint(half / STEP)
    manifest = replace(
        checkpoint.manifest, files={name: describe_file(half / STEP / name) for name in checkpoint.manifest.files}
    )
    write_manifest(half / STEP, manifest)
    other = checkpoints.reshaped(half, tmp_path / "other", "tokenformer", (1, 2, 1), **fp16)
    content = torch.load(other / STEP / "zero_pp_rank_0_mp_rank_01_optim_states.pt", weights_only=False)
    assert content["optimizer_state_dict"]["loss_scaler"].cur_scale == 64.0


def test_what_it_writes_is_a_whole_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints.trained("tokenformer", (2, 2, 1))
    output = checkpoints.reshaped(source, tmp_path / "output", "tokenformer", (1, 1, 2), precision="bfloat16")
    assert (output / "latest").read_text() == f"{STEP}\n"
    found, theirs = (find_checkpoint(folder, None, "full") for folder in (output, source))
    assert found is not None and theirs is not None
    assert found.state.data_parallel_size == 2
    assert found.manifest.layout == {"tensor": 1, "pipe": 1, "data": 2}
    assert found.config.training.precision.dtype == "bf16"
    assert found.config.training.optimizer == theirs.config.training.optimizer
    assert found.state.consumed_train_samples == theirs.state.consumed_train_samples
    config = checkpoints.config("goes-on", MODELS["tokenformer"] | {"precision": "bfloat16"}, (1, 1, 2))
    finished = run_ranks(config, f"load={output}", "train_iters=5", "override_lr_scheduler=true", ranks=2)
    assert finished.code == 0
    assert "another layout" not in finished.output


def test_what_it_refuses(checkpoints: Checkpoints, tmp_path: Path) -> None:
    from megatron.errors import CheckpointError, ConfigError

    source = checkpoints.trained("tokenformer", (2, 2, 1))
    output = tmp_path / "output"
    with pytest.raises(CheckpointError, match="ffn"):
        checkpoints.reshaped(source, output, "tokenformer", (1, 1, 1), ffn_slot_num=96)
    with pytest.raises(CheckpointError, match="padded to 512, this run one of 512 padded to 640"):
        checkpoints.reshaped(source, output, "tokenformer", (1, 1, 1), padded_vocab_size=640)
    with pytest.raises(ConfigError, match="model_parallel_size: 3: does not divide"):
        checkpoints.reshaped(source, output, "tokenformer", (3, 1, 1))
    with pytest.raises(CheckpointError, match="Name another folder"):
        checkpoints.reshaped(source, source, "tokenformer", (1, 1, 1))
    damaged = tmp_path / "damaged" / STEP
    shutil.copytree(source / STEP, damaged)
    next(damaged.glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not whole"):
        checkpoints.reshaped(damaged, output, "tokenformer", (1, 1, 1))
    assert not list(output.glob("*global_step*")) and not list(output.glob("*/.*"))
