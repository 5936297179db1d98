"""A file that is written over hours: under a working name, in a way that goes on after a kill, published when whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError
from megatron.io.durable import flush_file, flush_folder
from megatron.io.hashing import HashingWriter

_BYTES_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class FileFacts:
    """Size [bytes] and SHA-256 of a whole file."""

    size: int
    sha256: str


def working_path(path: Path) -> Path:
    """Returns the name under which `path` is written before it is whole."""
    return path.with_name(f"{path.name}.partial")


class WorkingFile:
    """Appends to `<path>.partial`, which `publish` renames to `path`.

    What was written up to a `save` outlasts a kill: a later object goes on from the size that `save` has returned, and
    what came after it is cut off. Raises DataError where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        """Opens the working file at `size` [bytes]. Raises DataError when it holds less."""
        self.path = path
        self.working = working_path(path)
        with _as_data_errors(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.working.open("r+b" if size else "wb")
            self._file.truncate(max(size, 0))
        if self._file.seek(0, 2) < size or self.working.stat().st_size != size:
            self._file.close()
            raise DataError(f"{self.working}: shorter than the {size:,} bytes that were written before.")
        self._hashing = HashingWriter(self._file)
        self._read_back(size)

    @property
    def size(self) -> int:
        """Returns the bytes written so far."""
        return self._hashing.size

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        with _as_data_errors(self.path):
            self._hashing.write(data)

    def save(self) -> int:
        """Brings what was written to disk; returns the size from which to go on [bytes]."""
        with _as_data_errors(self.path):
            flush_file(self._file)
        return self.size

    def finish(self) -> FileFacts:
        """Brings the whole file to disk, still under its working name; returns its size and hash."""
        if not self._file.closed:
            self.save()
            self._file.close()
        return FileFacts(self.size, self._hashing.sha256)

    def publish(self) -> None:
        """Gives the finished file its name. Does nothing where an earlier process has done so."""
        publish(self.path)

    def discard(self) -> None:
        """Deletes the working file."""
        self.close()
        self.working.unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the working file and leaves it as it is, for a later process to go on."""
        with contextlib.suppress(OSError):  # a full disk, which the error under way tells of
            self._file.close()

    def _read_back(self, size: int) -> None:
        # A hash cannot be stored half-way, and reading is far quicker than what made the bytes.
        with self.working.open("rb") as file:
            while self._hashing.size < size:
                self._hashing.add(file.read(min(_BYTES_AT_A_TIME, size - self._hashing.size)))


def publish(path: Path) -> None:
    """Renames the finished working file of `path` to `path`, durably; a second call does nothing."""
    working = working_path(path)
    with _as_data_errors(path):
        if working.exists():
            working.replace(path)
            flush_folder(path.parent)


@contextmanager
def _as_data_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}). Make room, or choose a folder that you may write."
        ) from error
