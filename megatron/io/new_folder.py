"""An output folder that is there when it is whole, and otherwise not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import CheckpointError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which gets that name at the end; on any exception it is deleted.

    Raises CheckpointError when `path` exists and is not an empty folder, or cannot be made.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty folder. Name another one, or remove it.")
    temporary = path.with_name(f".{path.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
