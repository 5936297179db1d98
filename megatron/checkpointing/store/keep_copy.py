"""Keeps a checkpoint that is about to be replaced under its name in another folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.io.durable import flush_folder


def keep_copy(checkpoint: Path, folder: Path) -> Path:
    """Makes `folder`/<name of the checkpoint>, whole or not at all, of the same files on disk; returns its path.

    Files are linked, and copied where the file system has no hard links. One of the same content that is there already
    stays. What conversions have left in the checkpoint is not kept.
    """
    final = folder / checkpoint.name
    manifest = (checkpoint / MANIFEST_FILE).read_bytes()
    with contextlib.suppress(OSError):
        if (final / MANIFEST_FILE).read_bytes() == manifest:
            return final
    temporary = folder / f".{checkpoint.name}.writing"
    for leftover in (temporary, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    for file in sorted(checkpoint.iterdir()):
        if file.is_file():
            _link_or_copy(file, temporary / file.name)
    flush_folder(temporary)
    temporary.rename(final)
    flush_folder(folder)
    return final


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
