"""Models from checkpoints, in every precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.fetch import configured_checkpoint
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.loaded_model.generate_tokens import generate_tokens
from megatron.loaded_model.loaded_model import load_model
from megatron.loaded_model.sampling import SamplingSettings
from megatron.mpu.context import ParallelContext
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import export, make_checkpoint, tokens, whole_model, write_yaml

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A TokenFormer's, of one rank."""
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("checkpoint"), TOKENFORMER))


def changed(config: RunConfig, section: str, **values: object) -> RunConfig:
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_configuration_decides_the_precision(checkpoint: Checkpoint, precision: str, dtype: torch.dtype) -> None:
    config = checkpoint.config
    format_ = config.training.precision.model_copy(update={"dtype": precision})
    model = load_model(changed(config, "training", precision=format_), checkpoint, ParallelContext.single(), CPU)
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
    got = model.logits(tokens())
    with torch.no_grad():
        want = whole_model(config)(tokens())
    assert got.dtype == dtype and (got.float() - want).abs().max() < 0.05 * want.abs().max()


def test_another_context_is_fine_and_another_model_is_not(checkpoint: Checkpoint) -> None:
    longer = changed(checkpoint.config, "model", seq_length=64, max_position_embeddings=64)
    assert load_model(longer, checkpoint, ParallelContext.single(), CPU).context_length == 64
    with pytest.raises(ConfigError, match="another model than the configuration describes: tie_embeddings"):
        load_model(changed(checkpoint.config, "model", tie_embeddings=False), checkpoint, ParallelContext.single(), CPU)


@pytest.mark.parametrize("positions", [8, 64])
def test_as_many_learned_positions_as_there_are(positions: int, gpt2: Checkpoint) -> None:
    other = changed(gpt2.config, "model", seq_length=8, max_position_embeddings=positions)
    with pytest.raises(ConfigError, match=f"max_position_embeddings: checkpoint 16, configuration {positions}"):
        load_model(other, gpt2, ParallelContext.single(), CPU)
    shorter = changed(gpt2.config, "model", seq_length=8)
    assert load_model(shorter, gpt2, ParallelContext.single(), CPU).context_length == 8


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, TOKENFORMER))
    file = checkpoint.path / "layer_01-model_00-model_states.pt"
    weights = torch.load(file, weights_only=True)
    weights["mlp.key_tokens"][3, 2] = float("nan")
    torch.save(weights, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.key_tokens holds NaN"):
        load_model(checkpoint.config, checkpoint, ParallelContext.single(), CPU)


def test_which_checkpoint_is_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = str(checkpoint.path.parent)
    assert configured_checkpoint(CheckpointConfig(load=folder)).path == checkpoint.path
    assert configured_checkpoint(CheckpointConfig(save=folder)).path == checkpoint.path
    assert configured_checkpoint(CheckpointConfig(save=folder, load=folder), iteration=7).path == checkpoint.path
    with pytest.raises(CheckpointError, match="Iterations there: 7"):
        configured_checkpoint(CheckpointConfig(load=folder, iteration=8))
    with pytest.raises(CheckpointError, match="holds no checkpoint to read"):
        configured_checkpoint(CheckpointConfig(load=str(tmp_path)))
    with pytest.raises(ConfigError, match="no checkpoint is named"):
        configured_checkpoint(CheckpointConfig())


@pytest.mark.parametrize(
    ("settings", "tensor"),
    [
        (TOKENFORMER, 2),
        (PYTHIA, 1),
        pytest.param(TOKENFORMER | {"no_weight_tying": True}, 1, marks=pytest.mark.full),
        pytest.param(PYTHIA | {"no_weight_tying": False}, 2, marks=pytest.mark.full),
    ],
)
def test_greedy_tokens_are_those_of_the_exported_folder(
    settings: dict[str, object], tensor: int, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, settings), tensor=tensor)
    model = load_model(checkpoint.config, checkpoint, ParallelContext.single(), CPU)
    exported = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "hf"), trust_remote_code=True)
    prompts = [[5, 300, 17], [250] * 8, [9]]
    ours = generate_tokens(model, prompts, SamplingSettings(maximum_tokens=8), start_token=0, stop_tokens={0})
    for prompt, continuation in zip(prompts, ours, strict=True):
        theirs = exported.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert continuation.tokens == (theirs[: theirs.index(0)] if 0 in theirs else theirs)
