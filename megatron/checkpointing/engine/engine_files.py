"""DeepSpeed's checkpoint engine, with files that are flushed and hashed while written, and never unpickled freely."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from megatron.checkpointing.engine.shared_copies import SharedCopies
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import CheckpointError
from megatron.io.hashing import HashingWriter


def build_engine_files(config: CheckpointConfig) -> EngineFiles:
    """Returns the `checkpoint_engine` of a run: one that copies what it saves where saves are asynchronous."""
    files = SnapshotFiles if config.async_save else EngineFiles
    return files(allow_unsafe=config.allow_unsafe_load)


class EngineFiles(CheckpointEngine):  # type: ignore[misc] # DeepSpeed is untyped
    """DeepSpeed's `checkpoint_engine`.

    A failure to write is kept rather than raised: the other ranks are on their way to a barrier, and would wait there
    for ever. `taken` hands out what happened once all ranks are through.
    """

    def __init__(self, *, allow_unsafe: bool) -> None:
        self._allow_unsafe = allow_unsafe
        self._written: dict[str, FileEntry] = {}
        self._failure: str | None = None

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begins a save."""
        self._written, self._failure = {}, None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing: the folder of a save exists already."""

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file and brings it to disk."""
        if self._failure is not None:
            return
        file = Path(path)
        try:
            self._written[file.name] = self._write_file(state_dict, file)
        # torch's writer turns an OSError of the file below it into a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            self._failure = f"{file.name}: {reason}"

    def _write_file(self, content: Any, file: Path) -> FileEntry:
        return write_tensors(content, file)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Reads one file on the CPU. Raises CheckpointError when it is damaged or could run code."""
        return load_tensors(Path(path), allow_unsafe=self._allow_unsafe, mmap=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Does nothing: the checkpoint is published by whoever asked the engine for it."""
        return True

    def taken(self) -> dict[str, FileEntry]:
        """Returns the files that this rank wrote since the save began.

        Raises CheckpointError when one could not be written.
        """
        if self._failure is not None:
            raise CheckpointError(self._failure)
        return self._written


class SnapshotFiles(EngineFiles):
    """Copies what is to be saved into host memory; `write`, in another thread, has a process write it from there."""

    def __init__(self, *, allow_unsafe: bool) -> None:
        super().__init__(allow_unsafe=allow_unsafe)
        self._shared: SharedCopies | None = None
        self._copies: dict[str, Any] = {}
        self._unwritten: list[str] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begins a save."""
        super().create(info)
        self._unwritten = []

    def preserves_storage_sharing(self) -> bool:
        """Tells DeepSpeed that the copies share no storage, so that it need not make its own."""
        return False

    def save(self, state_dict: Any, path: str) -> None:
        """Copies the content of one file."""
        name = Path(path).name
        try:
            if self._shared is None:
                # In the thread that takes the steps: the process ends with it.
                self._shared = SharedCopies()
            self._copies[name] = self._shared.copied(state_dict, self._copies.get(name))
        # torch tells of too little host memory by a RuntimeError.
        except (OSError, MemoryError, RuntimeError) as error:
            self._failure = f"{name}: no copy for async_save: {str(error).splitlines()[0]}"
        else:
            self._unwritten.append(path)

    def write(self) -> None:
        """Writes the files that are copied."""
        while self._unwritten:
            path = self._unwritten[0]
            super().save(self._copies[Path(path).name], path)
            del self._unwritten[0]

    def _write_file(self, content: Any, file: Path) -> FileEntry:
        if self._shared is None:
            raise RuntimeError("nothing is copied yet")
        return self._shared.write(content, file)

    def taken(self) -> dict[str, FileEntry]:
        if self._unwritten:
            raise CheckpointError(f"{Path(self._unwritten[0]).name}: the writing thread has ended unexpectedly")
        return super().taken()


class NowhereFiles(EngineFiles):
    """Does all that a save does but keep it: copies first where saves are asynchronous, serializes and hashes."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__(allow_unsafe=False)
        self._shared = SharedCopies() if copies else None

    def save(self, state_dict: Any, path: str) -> None:
        """Counts the bytes of one file."""
        name = Path(path).name
        try:
            content = state_dict if self._shared is None else self._shared.copied(state_dict, None)
            with Path(os.devnull).open("wb") as nowhere:
                hashed = HashingWriter(nowhere)
                torch.save(content, hashed)  # type: ignore[arg-type] # torch asks for no more than this
        except (OSError, MemoryError, RuntimeError) as error:
            self._failure = f"{name}: {str(error).splitlines()[0]}"
        else:
            self._written[name] = FileEntry(hashed.size, hashed.sha256)
