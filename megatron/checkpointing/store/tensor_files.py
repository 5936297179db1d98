"""Tensor files that are flushed to disk and hashed while they are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.store.manifest import FileEntry
from megatron.io.durable import flush_file
from megatron.io.hashing import HashingWriter


def write_tensors(content: Any, path: Path) -> FileEntry:
    """Writes a new file with `torch.save`, flushed to disk; returns its size and hash.

    They are of what was meant to be written, not of what a bad disk may give back.
    """
    with path.open("xb") as file:
        hashed = HashingWriter(file)
        torch.save(content, hashed)  # type: ignore[arg-type] # torch asks for no more than this
        flush_file(file)
    return FileEntry(hashed.size, hashed.sha256)
