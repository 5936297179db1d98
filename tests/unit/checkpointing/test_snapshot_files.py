"""What asynchronous saves copy, and what their thread writes."""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from torch import nn

from megatron.checkpointing.engine.engine_files import EngineFiles, SnapshotFiles
from megatron.checkpointing.store.manifest import describe_file
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
from megatron.io.background_writer import BackgroundWriter, SharedMemory
from megatron.io.writer_process import Piece
from tests.helpers.tensor_files import tensors

INFO = CheckpointCommitInfo(tag="tag", save_dir="folder", save_latest=False)


def content() -> dict[str, Any]:
    flat = torch.arange(100.0)
    return {
        "module": OrderedDict(weight=flat[10:20].view(2, 5), bias=nn.Parameter(torch.ones(3))),
        "groups": [flat[20:30], {"step": torch.tensor(4.0), "betas": (0.9, 0.95)}],
        "scaler": LossScaler(scale=8.0),
        "steps": 4,
    }


def test_what_changes_after_the_copy_is_not_written(tmp_path: Path) -> None:
    written = content()
    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    files.save(written, str(tmp_path / "snapshot.pt"))
    for tensor in (written["module"]["weight"], written["groups"][0], written["groups"][1]["step"]):
        tensor.fill_(-1.0)
    with torch.no_grad():
        written["module"]["bias"].zero_()
    written["scaler"].cur_scale = 1.0
    written["groups"].append("more")
    files.write()
    ours = load_tensors(tmp_path / "snapshot.pt")
    theirs = content()
    assert torch.equal(ours["module"]["weight"], theirs["module"]["weight"])
    assert torch.equal(ours["module"]["bias"], theirs["module"]["bias"])
    assert torch.equal(ours["groups"][0], theirs["groups"][0])
    assert ours["groups"][1] == theirs["groups"][1]
    assert (ours["scaler"].cur_scale, ours["steps"], len(ours["groups"])) == (8.0, 4, 2)
    assert files.taken() == {"snapshot.pt": describe_file(tmp_path / "snapshot.pt")}


def test_a_copy_is_of_a_view_alone(tmp_path: Path) -> None:
    """DeepSpeed hands over views of tensors that hold all of a rank's weights, and need not copy them itself."""
    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    files.save({"weight": torch.zeros(1_000_000)[:10]}, str(tmp_path / "view.pt"))
    files.write()
    assert (tmp_path / "view.pt").stat().st_size < 10_000
    assert not files.preserves_storage_sharing()
    assert EngineFiles(allow_unsafe=False).preserves_storage_sharing()


def addresses(files: SnapshotFiles) -> list[int]:
    return [tensor.data_ptr() for content in files._copies.values() for tensor in tensors(content).values()]


def test_the_next_copy_goes_into_the_same_memory(tmp_path: Path) -> None:
    files = SnapshotFiles(allow_unsafe=False)
    seen = []
    for step, size in ((1, 10), (2, 10), (3, 20)):
        files.create(INFO)
        changed = content() | {"more": torch.full((size,), float(step))}
        changed["groups"] = changed["groups"][:step]
        folder = tmp_path / str(step)
        folder.mkdir()
        files.save(changed, str(folder / "a.pt"))
        files.write()
        seen.append(addresses(files))
        ours, theirs = tensors(load_tensors(folder / "a.pt")), tensors(changed)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert files.taken().keys() == {"a.pt"}
    assert set(seen[0]) < set(seen[1])
    assert set(seen[1]) - set(seen[2]) == {seen[1][-1]}, "only the tensor that grew got another place"


def test_files_are_those_of_a_save_that_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte; and the process is told places in memory, and little else."""
    told: list[Piece] = []
    own = BackgroundWriter.write

    def spied(writer: BackgroundWriter, file: BinaryIO, pieces: Sequence[Piece]) -> tuple[int, str]:
        told.extend(pieces)
        return own(writer, file, pieces)

    monkeypatch.setattr(BackgroundWriter, "write", spied)
    written = content() | {
        "large": torch.randn(300, 500).to(torch.bfloat16).T,
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(3, dtype=torch.int64),
    }
    snapshots, plain = SnapshotFiles(allow_unsafe=False), EngineFiles(allow_unsafe=False)
    for files, name in ((snapshots, "snapshot"), (plain, "plain")):
        (tmp_path / name).mkdir()
        files.create(INFO)
        # As copies are: contiguous, and without other elements of the same memory.
        same = {**written, "large": written["large"].contiguous(), "module": {}, "groups": []}
        files.save(same, str(tmp_path / name / "a.pt"))
    snapshots.write()
    assert snapshots.taken() == plain.taken()
    assert (tmp_path / "snapshot/a.pt").read_bytes() == (tmp_path / "plain/a.pt").read_bytes()
    assert sum(piece[1] for piece in told if isinstance(piece, tuple)) == 300 * 500 * 2 + 2 + 8
    assert sum(len(piece) for piece in told if isinstance(piece, bytes)) < 4_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_what_lies_on_a_gpu_are_pinned(tmp_path: Path) -> None:
    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    weight = torch.arange(10_000.0, device="cuda")
    files.save({"weight": weight}, str(tmp_path / "a.pt"))
    assert files._copies["a.pt"]["weight"].is_pinned()
    files.write()
    assert torch.equal(load_tensors(tmp_path / "a.pt")["weight"], weight.cpu())


def test_a_thread_that_ends_unexpectedly_is_a_failure(tmp_path: Path) -> None:
    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    files.save({"weight": torch.zeros(10)}, str(tmp_path / "good.pt"))
    files.save({"function": lambda: None}, str(tmp_path / "bad.pt"))
    with pytest.raises(Exception, match="pickle"):
        files.write()
    with pytest.raises(CheckpointError, match=r"bad\.pt: the writing thread has ended unexpectedly"):
        files.taken()


def test_too_little_memory_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(memory: SharedMemory, size: int) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    monkeypatch.setattr(SharedMemory, "block", no_memory)
    files.save({"weight": torch.zeros(10)}, str(tmp_path / "a.pt"))
    files.write()
    with pytest.raises(CheckpointError, match=r"a\.pt: no copy for async_save: .*Cannot allocate memory"):
        files.taken()
