"""Files and renames that outlast a power loss."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a text file and bring it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Give `path` a new content at once: a reader sees the old or the new one, whatever happens."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_durably(temporary, text)
    temporary.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Bring a folder's entries to disk: without it a power loss can undo a rename that was seen to happen."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
