"""Checkpoint folders: schedule, names, the latest one, retention, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.folder import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    publish,
    remove_old,
    require_writable,
    write_state,
)
from megatron.checkpointing.safe_files import load_tensors
from megatron.checkpointing.schedule import save_iterations
from megatron.config.model import ModelConfig
from megatron.config.output import CheckpointConfig
from megatron.config.run import RunConfig
from megatron.config.training import OptimizerConfig, TrainingConfig
from megatron.errors import CheckpointError

STATE = RunState(
    iteration=10,
    consumed_train_samples=160,
    consumed_valid_samples=32,
    train_index_samples=1000,
    valid_index_samples=100,
    tensor_parallel_size=1,
    pipe_parallel_size=1,
    data_parallel_size=1,
    vocab_size=100,
    padded_vocab_size=128,
)
CONFIG = RunConfig(
    model=ModelConfig(
        architecture="gpt_neox",
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        seq_length=8,
        max_position_embeddings=8,
        pos_emb="rotary",
    ),
    training=TrainingConfig(train_iters=10, optimizer=OptimizerConfig(lr=1e-3)),
)


def save(folder: Path, iteration: int) -> None:
    temporary = folder / f".global_step{iteration}.tmp"
    temporary.mkdir(parents=True)
    write_state(temporary, replace(STATE, iteration=iteration), CONFIG)
    publish(temporary, folder / f"global_step{iteration}")


def test_pythia_saves_154_checkpoints() -> None:
    config = CheckpointConfig(checkpoint_factor=1000, extra_save_iters=[0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    iterations = save_iterations(config, 143000)
    assert len(iterations) == 154
    assert {0, 512, 1000, 143000} <= iterations
    assert 1024 not in iterations


def test_log_schedule() -> None:
    config = CheckpointConfig(checkpoint_factor=3, checkpoint_scale="log")
    assert save_iterations(config, 30) == {1, 3, 9, 27, 30}


def test_latest_is_found_and_read_back(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    found = find_checkpoint(tmp_path, None)
    assert found is not None
    assert found.state == replace(STATE, iteration=20)
    assert found.config == CONFIG
    assert find_checkpoint(tmp_path / "global_step10", None).state.iteration == 10  # type: ignore[union-attr]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, None) is None
    assert find_checkpoint(tmp_path / "missing", None) is None


def test_asked_for_iteration_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"no checkpoint of iteration 15\. Iterations there: 10\."):
        find_checkpoint(tmp_path, 15)


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}', '{"format": 99}'])
def test_damaged_state_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    (tmp_path / "global_step10" / "state.json").write_text(damage)
    with pytest.raises(CheckpointError, match="global_step10"):
        find_checkpoint(tmp_path, None)


def test_latest_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        find_checkpoint(tmp_path, None)


def test_retention_keeps_the_newest_and_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    for iteration in (5, 10, 100):
        save(tmp_path, iteration)
    (tmp_path / "global_step_notes").mkdir()
    remove_old(tmp_path, 2)
    assert [iteration for iteration, _ in list_checkpoints(tmp_path)] == [10, 100]
    assert (tmp_path / "global_step_notes").is_dir()


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / "global_step10" / "old").touch()
    save(tmp_path, 10)
    assert not (tmp_path / "global_step10" / "old").exists()


def test_a_file_in_the_way_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"save: .*file/run cannot be written"):
        require_writable(tmp_path / "file" / "run")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_bomb_does_not_run(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2), "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "layer.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_tensors(tmp_path / "layer.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    torch.save(torch.arange(1000), tmp_path / "layer.pt")
    content = (tmp_path / "layer.pt").read_bytes()
    (tmp_path / "layer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"layer\.pt cannot be read"):
        load_tensors(tmp_path / "layer.pt")
