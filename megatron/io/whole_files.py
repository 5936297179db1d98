"""Files that appear whole or not at all, and locks between the processes that write them."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import DataError

logger = logging.getLogger(__name__)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path in `path`'s folder; on success it is flushed to disk and renamed to `path`.

    On any exception the temporary file is removed and `path` keeps what it held before. The folder is made when
    missing. Raises DataError when the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}). Choose a folder that you may write.") from error
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for other processes to release it; a process that dies releases it.

    Only saves work that several processes would do in parallel: `written_whole` keeps the files right without it, so
    a file system without locks is no error.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("%s: no file locks here (%s); several ranks may build the same files", path, error.strerror)
        yield


def _flush_to_disk(path: Path) -> None:
    # Without it a power loss just after the rename can leave an empty file under the final name.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
