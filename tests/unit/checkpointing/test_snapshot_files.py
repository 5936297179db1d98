"""What asynchronous saves copy, and what their thread writes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from torch import nn

from megatron.checkpointing.engine import engine_files
from megatron.checkpointing.engine.engine_files import EngineFiles, SnapshotFiles
from megatron.checkpointing.store.manifest import describe_file
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
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
    def no_memory(content: Any, before: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    files = SnapshotFiles(allow_unsafe=False)
    files.create(INFO)
    monkeypatch.setattr(engine_files, "_copied", no_memory)
    files.save({"weight": torch.zeros(10)}, str(tmp_path / "a.pt"))
    files.write()
    with pytest.raises(CheckpointError, match=r"a\.pt: no copy for async_save: DefaultCPUAllocator"):
        files.taken()
