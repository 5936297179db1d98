"""Tensor files: what is refused, and that nothing in them runs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.engine.engine_files import EngineFiles, write_tensors
from megatron.checkpointing.store.manifest import describe_file
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
from tests.helpers.bombs import Bomb


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    path = tmp_path / "layer.pt"
    torch.save({"weights": torch.zeros(2), "bomb": Bomb(tmp_path / "exploded")}, path)
    return path


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    ("allow_unsafe", "remedy"), [(False, "set `allow_unsafe_load: true`"), (None, "Training writes no such file")]
)
def test_a_pickle_bomb_does_not_run(bomb: Path, mmap: bool, allow_unsafe: bool | None, remedy: str) -> None:
    with pytest.raises(CheckpointError, match=f"could run code: it is refused.*{remedy}"):
        load_tensors(bomb, allow_unsafe=allow_unsafe, mmap=mmap)
    assert not (bomb.parent / "exploded").exists()


def test_deepspeed_is_not_given_a_pickle_bomb(bomb: Path) -> None:
    with pytest.raises(CheckpointError, match="could run code"):
        EngineFiles(allow_unsafe=False).load(str(bomb))
    assert not (bomb.parent / "exploded").exists()


def test_an_explicit_flag_loads_anything(bomb: Path) -> None:
    loaded = EngineFiles(allow_unsafe=True).load(str(bomb))
    assert torch.equal(loaded["weights"], torch.zeros(2))
    assert (bomb.parent / "exploded").exists()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("length", [0, 10, 0.5])
def test_a_truncated_file_is_named(tmp_path: Path, mmap: bool, length: float) -> None:
    path = tmp_path / "layer.pt"
    torch.save(torch.arange(1000), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * length) if isinstance(length, float) else length])
    with pytest.raises(CheckpointError, match=r"layer\.pt"):
        load_tensors(path, mmap=mmap)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_in_torch_s_format_before_1_6_is_read(tmp_path: Path, mmap: bool) -> None:
    """Only the format of archives can be mapped."""
    tensors = {"a": torch.arange(1000), "b": torch.ones(3, dtype=torch.bfloat16)}
    path = tmp_path / "layer.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    loaded = load_tensors(path, mmap=mmap)
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"layer\.pt cannot be read: .*damaged"):
        load_tensors(path, mmap=mmap)


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer\.pt is not there\..*keep_last_n_checkpoints") as caught:
        load_tensors(tmp_path / "layer.pt")
    assert "damaged" not in str(caught.value)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt cannot be read \(Is a directory\)\."):
        load_tensors(tmp_path / "folder.pt")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "layer.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer/data.pkl", bytes(1 << 24))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="is compressed, which torch never does"):
        load_tensors(path)


def test_a_file_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "layer.pt"
    tensors = {"a": torch.arange(100_000), "b": torch.zeros(3, dtype=torch.bfloat16)}
    assert write_tensors(tensors, path) == describe_file(path)
    loaded = load_tensors(path)
    assert all(torch.equal(tensors[name], loaded[name]) for name in tensors)


def test_a_file_that_cannot_be_written_is_told_afterwards(tmp_path: Path) -> None:
    files = EngineFiles(allow_unsafe=False)
    files.create(None)  # type: ignore[arg-type] # what DeepSpeed says of the save is not looked at
    files.save({"a": torch.zeros(1)}, str(tmp_path / "first.pt"))
    files.save({"a": torch.zeros(1)}, str(tmp_path / "missing" / "second.pt"))
    files.save({"a": torch.zeros(1)}, str(tmp_path / "third.pt"))
    with pytest.raises(CheckpointError, match=r"second\.pt: No such file or directory"):
        files.taken()
    assert not (tmp_path / "third.pt").exists()
