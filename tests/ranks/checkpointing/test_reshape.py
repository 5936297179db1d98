"""Checkpoints rewritten for another layout, held against those that DeepSpeed's engine writes in it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.manifest import describe_file, write_manifest
from tests.helpers.covers import covered, pairwise_cover
from tests.helpers.layout_runs import BF16_COVER, PAIRWISE, Case, Layout, LayoutRuns, case_with
from tests.helpers.tensor_files import assert_same_checkpoint
from tools.ckpts import reshape

STEP = "global_step3"
ODD = {"hidden_size": 36, "pipe_partition_method": "parameters", "num_layers": 3, "train_iters": 3}
"""Pieces of the data-parallel ranks end within parameters, and in padding."""
CHANGES: dict[str, dict[str, Any]] = {"tokenformer": {}, "pythia": ODD, "gpt2": {}, "llama": {}}
WRITTEN = [(2, 1, 2), (1, 2, 2)], ["fp32", "bfloat16"]


class Sources:
    """Runs in the layouts, and what the command makes of their checkpoints."""

    def __init__(self, runs: LayoutRuns) -> None:
        self.runs = runs

    def trained(self, model: str, layout: Layout, precision: str = "fp32") -> Path:
        """Returns the folder of a run."""
        changes = CHANGES[model] | ({} if precision == "fp32" else {"precision": precision})
        return self.runs.trained(source_case(model, layout, precision), **changes).folder

    def reshaped(self, source: Path, output: Path, model: str, layout: Layout, **changes: Any) -> Path:
        """Runs the command for the configuration that `trained` has in this layout, with changes."""
        case = source_case(model, layout, changes.get("precision", "fp32"))
        config = self.runs.config(f"for-{output.name}", case.keys() | CHANGES[model] | changes)
        folders = ["--input_dir", str(source), "--config_file", str(config), "--output_dir", str(output)]
        assert reshape.main([*folders, "--ranks", str(case.ranks)]) == 0
        return output


def source_case(model: str, layout: Layout, precision: str) -> Case:
    """Returns the run in a layout that other tests train as well, where there is one."""
    if model == "pythia":
        return Case(model, layout, tied=False)
    in_bf16 = (case for case in BF16_COVER if (case.model, case.layout) == (model, layout))
    plain_one = case_with(layout, model, tied=True)
    return next(in_bf16, plain_one) if precision == "bfloat16" else plain_one


@pytest.fixture
def sources(layout_runs: LayoutRuns) -> Sources:
    return Sources(layout_runs)


@pytest.mark.parametrize("model", covered(list(CHANGES), PAIRWISE))
def test_to_one_process_and_back_is_bit_identical(model: str, sources: Sources, tmp_path: Path) -> None:
    """Weights and moments, in every file; and the way back is to files that DeepSpeed wrote itself."""
    source = sources.trained(model, (2, 2, 1)) / STEP
    single = sources.reshaped(source, tmp_path / "single", model, (1, 1, 1))
    assert len(list((single / STEP).glob("*optim_states.pt"))) == 1
    back = sources.reshaped(single, tmp_path / "back", model, (2, 2, 1))
    assert_same_checkpoint(back / STEP, source)


@pytest.mark.parametrize(
    ("model", "layout", "precision"),
    covered(list(product(CHANGES, *WRITTEN)), pairwise_cover(list(product(PAIRWISE, *WRITTEN)), list)),
)
def test_files_are_those_of_the_engine(
    model: str, layout: Layout, precision: str, sources: Sources, tmp_path: Path
) -> None:
    """All that a file holds but the engine's configuration, which nothing reads."""
    source = sources.trained(model, layout, precision)
    single = sources.reshaped(source / STEP, tmp_path / "single", model, (1, 1, 1), precision=precision)
    back = sources.reshaped(single, tmp_path / "back", model, layout, precision=precision)
    for step in (STEP, "global_step0"):
        if step == "global_step0":
            back = sources.reshaped(source / step, tmp_path / "start", model, layout, precision=precision)
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


def test_another_precision_keeps_the_masters(sources: Sources, tmp_path: Path) -> None:
    source = sources.trained("tokenformer", (1, 2, 2), "bfloat16") / STEP
    exact = sources.reshaped(source, tmp_path / "exact", "tokenformer", (2, 1, 1), precision="fp32")
    back = sources.reshaped(exact, tmp_path / "back", "tokenformer", (1, 2, 2), precision="bfloat16")
    assert_same_checkpoint(back / STEP, source)
    layer = torch.load(exact / STEP / "layer_01-model_00-model_states.pt", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in layer.values())
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in layer.values())


def test_fp16_starts_with_its_loss_scale_and_keeps_it(sources: Sources, tmp_path: Path) -> None:
    """Against DeepSpeed's scaler, made from the same settings; its engine trains in fp16 on GPUs alone."""
    source = sources.trained("tokenformer", (2, 2, 1)) / STEP
    fp16 = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 9, "hysteresis": 3, "min_loss_scale": 2}}
    half = sources.reshaped(source, tmp_path / "half", "tokenformer", (1, 1, 2), **fp16)
    file = half / STEP / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=False)
    scaler = content["optimizer_state_dict"]["loss_scaler"]
    expected = DynamicLossScaler(2**9, 1000, 2, 3, consecutive_hysteresis=False)
    assert vars(scaler) == vars(expected)
    assert content["optimizer_state_dict"]["dynamic_loss_scale"] is True
    layer = torch.load(half / STEP / "layer_01-model_00-model_states.pt", weights_only=True)
    assert all(weight.dtype == torch.float16 for weight in layer.values())

    back = sources.reshaped(half, tmp_path / "back", "tokenformer", (2, 2, 1))
    assert_same_checkpoint(back / STEP, source)
    for path in (half / STEP).glob("zero*"):
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["loss_scaler"].cur_scale = 64.0
        torch.save(content, path)
    checkpoint = read_checkpoint(half / STEP)
    manifest = replace(
        checkpoint.manifest, files={name: describe_file(half / STEP / name) for name in checkpoint.manifest.files}
    )
    write_manifest(half / STEP, manifest)
    other = sources.reshaped(half, tmp_path / "other", "tokenformer", (1, 2, 1), **fp16)
    content = torch.load(other / STEP / "zero_pp_rank_0_mp_rank_01_optim_states.pt", weights_only=False)
    assert content["optimizer_state_dict"]["loss_scaler"].cur_scale == 64.0


def test_what_it_writes_is_a_whole_checkpoint(sources: Sources, tmp_path: Path) -> None:
    source = sources.trained("tokenformer", (2, 2, 1)) / STEP
    output = sources.reshaped(source, tmp_path / "output", "tokenformer", (1, 1, 2), precision="bfloat16")
    assert (output / "latest").read_text() == f"{STEP}\n"
    found, theirs = (find_checkpoint(folder, None, "full") for folder in (output, source))
    assert found is not None and theirs is not None
    assert found.state.data_parallel_size == 2
    assert found.manifest.layout == {"tensor": 1, "pipe": 1, "data": 2}
    assert found.config.training.precision.dtype == "bf16"
    assert found.config.training.optimizer == theirs.config.training.optimizer
    assert found.state.consumed_train_samples == theirs.state.consumed_train_samples
    keys = source_case("tokenformer", (1, 1, 2), "bfloat16").keys() | {"precision": "bfloat16", "train_iters": 5}
    finished = sources.runs.start("goes-on", (1, 1, 2), keys | {"load": str(output), "override_lr_scheduler": True})
    assert finished.code == 0, finished.output
    assert "another layout" not in finished.output


def test_what_it_refuses(sources: Sources, tmp_path: Path) -> None:
    from megatron.errors import CheckpointError, ConfigError

    source = sources.trained("tokenformer", (2, 2, 1)) / STEP
    output = tmp_path / "output"
    with pytest.raises(CheckpointError, match="ffn"):
        sources.reshaped(source, output, "tokenformer", (1, 1, 1), ffn_slot_num=96)
    with pytest.raises(CheckpointError, match="padded to 512, this run one of 512 padded to 640"):
        sources.reshaped(source, output, "tokenformer", (1, 1, 1), padded_vocab_size=640)
    with pytest.raises(ConfigError, match="model_parallel_size: 3: does not divide"):
        sources.reshaped(source, output, "tokenformer", (3, 1, 1))
    with pytest.raises(CheckpointError, match="Name another folder"):
        sources.reshaped(source, source, "tokenformer", (1, 1, 1))
    damaged = tmp_path / "damaged" / STEP
    shutil.copytree(source, damaged)
    next(damaged.glob("*optim_states.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is not whole"):
        sources.reshaped(damaged, output, "tokenformer", (1, 1, 1))
    assert not list(output.glob("*global_step*")) and not list(output.glob("*/.*"))
