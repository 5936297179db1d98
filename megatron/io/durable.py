"""Files and folders that appear whole or not at all, and outlast a power loss.

What is new gets a temporary name beside the final one, is flushed to disk, and is then renamed: a reader sees the old
content or the new one, whatever happens in between.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron.errors import CheckpointError, DataError
from megatron.io.lease import LEASE_FILE, leased

logger = logging.getLogger(__name__)


def flush_file(file: IO[Any]) -> None:
    """Brings what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Brings a folder's entries to disk: without it a power loss can undo a rename that was seen to happen."""
    _flush_path(folder)


def write_durably(path: Path, text: str) -> None:
    """Writes a text file and brings it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        flush_file(file)


def replace_durably(path: Path, text: str) -> None:
    """Replaces a text file that one process alone writes; a temporary file left by a kill is reused.

    A link in its place is replaced itself, and what it leads to stays as it is. Where the disk is full, so does the
    file, and OSError is raised.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path in `path`'s folder; on success it is flushed to disk and renamed to `path`.

    Several processes may write the same file: each has a temporary path of its own, and the last rename wins. Names are
    drawn: processes of several machines or containers may have the same number. On any exception the temporary file is
    removed and `path` keeps what it held before. The folder is made when missing. Raises DataError when the folder
    cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}). Choose a folder that you may write.") from error
    try:
        yield temporary
        # Without it a power loss just after the rename can leave an empty file under the final name.
        _flush_path(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which gets that name at the end; on any exception it is deleted.

    One process writes it: a lease beside it says which. Raises CheckpointError when another is writing it, when `path`
    exists and is not an empty folder, or when it cannot be made.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty folder. Name another one, or remove it.")
    temporary = path.with_name(f".{path.name}.writing")
    with leased(path, "", file=path.with_name(f".{path.name}{LEASE_FILE}")):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
            temporary.mkdir()
            yield temporary
            if path.exists():
                path.rmdir()
            temporary.rename(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error}. Nothing was kept.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, waiting for other processes to release it; a process that dies releases it.

    It only saves work that several processes would do in parallel: `atomic_write` keeps the files right without it, so
    a file system without locks is no error.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.info("%s: no file locks here (%s); several ranks may build the same files", path, error.strerror)
        yield


def _flush_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
