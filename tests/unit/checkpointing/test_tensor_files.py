"""Files of tensors as they are written: whole in torch's reader, hashed, without torch's own checksums."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.store.manifest import describe_file
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.checkpointing.store.tensor_files import write_tensors


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_can_be_read(mmap: bool, tmp_path: Path) -> None:
    tensor, path = torch.arange(1000.0), tmp_path / "file.pt"
    assert write_tensors({"tensor": tensor, "step": 3}, path) == describe_file(path)
    read = load_tensors(path, mmap=mmap)
    assert torch.equal(read["tensor"], tensor) and read["step"] == 3
    assert torch.serialization.get_crc32_options(), "what others save keeps its checksums"


def test_no_checksum_is_computed_beside_the_hash(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    tensor = torch.arange(1000.0)
    write_tensors({"tensor": tensor}, path)
    with zipfile.ZipFile(path) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.file_size == 4000)
    checksum = zlib.crc32(tensor.numpy().tobytes())
    assert checksum != entry.CRC
