"""A text file that a run adds lines to for as long as it lasts, and that survives its removal."""

from __future__ import annotations

import logging
import os
from io import FileIO
from pathlib import Path

logger = logging.getLogger(__name__)


class AppendedFile:
    """Hands each line to the operating system at once, so that a killed run loses none.

    Where the file is removed under way, it is made again with the lines that it held, which the open file still has.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path` to append to it, and creates it and its folder. Raises OSError, for a link too."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def append(self, line: str) -> None:
        """Adds a line. Raises OSError where it cannot be written, and leaves no part of it."""
        if not os.path.lexists(self.path):
            self._restore()
        self._write(f"{line}\n".encode())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _open(self) -> FileIO:
        def without_links(name: str, flags: int) -> int:
            return os.open(name, flags | os.O_NOFOLLOW, 0o666)

        return FileIO(self.path, "a+", opener=without_links)

    def _write(self, content: bytes) -> None:
        length = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            self._file.truncate(length)
            raise

    def _restore(self) -> None:
        try:
            self._file.seek(0)
            held = self._file.read()
        except OSError:
            held = b""  # another machine has removed it, and the file server keeps nothing of it
        self._file.close()
        # Never the folder above it: a file system that is no longer mounted must not be written to another disk.
        self.path.parent.mkdir(exist_ok=True)
        self._file = self._open()
        self._write(held)
        lines = held.count(b"\n")
        logger.warning(
            "%s was removed while it was written; made again with the %d lines that it held", self.path, lines
        )
