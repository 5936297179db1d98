"""SHA-256 of files: whole, sampled, or while they are written. Digests are hexadecimal."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

_PIECES = 64
_PIECE_BYTES = 4096


def file_sha256(path: Path) -> str:
    """Hashes a whole file. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """Hashes the names and SHA-256 digests of a folder's files, without its subfolders'.

    Raises OSError when one cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def sampled_sha256(path: Path) -> str:
    """Hashes 64 evenly spaced pieces of 4 KiB, the first and the last bytes among them: cheap for a file of any size.

    Raises OSError when the file cannot be read.
    """
    digest = hashlib.sha256()
    last = max(path.stat().st_size - _PIECE_BYTES, 0)
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(last * piece // (_PIECES - 1))
            digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


class _Hashing:
    """A file with the size and the digest of what has passed on the way to it, or from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = 0
        """Passed so far [bytes]."""
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Returns the digest of what has passed so far."""
        return self._digest.hexdigest()

    def add(self, data: bytes | memoryview) -> None:
        """Hashes `data`, which the file holds already."""
        self._digest.update(data)
        self.size += len(data)


class HashingWriter(_Hashing):
    """Passes bytes on to a file and hashes them on the way, so that nothing is read back."""

    def write(self, data: bytes | memoryview) -> int:
        """Hashes and writes `data`; returns the number of bytes written."""
        self.add(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Hands what is buffered to the operating system."""
        self.file.flush()


class HashingReader(_Hashing):
    """Hashes what is read from a file on the way."""

    def read(self, size: int) -> bytes:
        """Reads and hashes at most `size` bytes."""
        data = self.file.read(size)
        self.add(data)
        return data
