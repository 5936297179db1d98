"""Tensor files that are flushed to disk and hashed while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.store.manifest import FileEntry
from megatron.io.durable import flush_file
from megatron.io.hashing import HashingWriter


def write_tensors(content: Any, path: Path) -> FileEntry:
    """Writes a new file with `torch.save`, flushed to disk; returns its size and hash.

    They are of what was meant to be written, not of what a bad disk may give back. torch's own checksums, which its
    reader never compares, are left out: they took about a seventh of the writing's processor time.
    """
    with path.open("xb") as file, without_crc32():
        hashed = HashingWriter(file)
        torch.save(content, hashed)  # type: ignore[arg-type] # torch asks for no more than this
        flush_file(file)
    return FileEntry(hashed.size, hashed.sha256)


@contextmanager
def without_crc32() -> Iterator[None]:
    """Lets `torch.save` leave its checksums out."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
