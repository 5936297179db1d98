"""Tensor files that are flushed to disk and hashed while they are written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron.checkpointing.store.manifest import FileEntry


def write_tensors(content: Any, path: Path) -> FileEntry:
    """Writes a new file with `torch.save`, flushed to disk; returns its size and hash.

    They are of what was meant to be written, not of what a bad disk may give back.
    """
    with path.open("xb") as file:
        hashed = _HashedFile(file)
        torch.save(content, hashed)  # type: ignore[arg-type] # torch asks for no more than this
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(hashed.size, hashed.digest.hexdigest())


class _HashedFile:
    """File as torch.save needs it, which hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
