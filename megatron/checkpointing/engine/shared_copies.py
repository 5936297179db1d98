"""Copies of what is to be saved, in memory that another process writes to files."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.tensor_files import without_crc32
from megatron.io.background_writer import BackgroundWriter, SharedMemory
from megatron.io.writer_process import Piece

logger = logging.getLogger(__name__)


class SharedCopies:
    """Copies tensors into shared memory, and has them written from there.

    Tensors of the same size and type go into the same memory again: to allocate it costs several times more than to
    copy.
    """

    def __init__(self) -> None:
        """Starts the process that writes. The thread that does so must outlive it."""
        self._memory = SharedMemory()
        self._places: dict[int, tuple[int, int]] = {}
        self._writer = BackgroundWriter(self._memory)

    def copied(self, content: Any, before: Any) -> Any:
        """Copies tensors, and everything else in dictionaries and lists, as they are now.

        `before` is the copy whose memory is used again, or None. Raises OSError where there is too little memory.
        """
        if isinstance(content, Tensor):
            return self._copied_tensor(content, before)
        if isinstance(content, dict):
            known = before if isinstance(before, dict) else {}
            return {key: self.copied(value, known.get(key)) for key, value in content.items()}
        if isinstance(content, list):
            known = dict(enumerate(before)) if isinstance(before, list) else {}
            return [self.copied(value, known.get(number)) for number, value in enumerate(content)]
        return copy.deepcopy(content)

    def _copied_tensor(self, content: Tensor, before: Any) -> Tensor:
        if isinstance(before, Tensor) and (before.shape, before.dtype) == (content.shape, content.dtype):
            place = before.detach()
        else:
            if isinstance(before, Tensor) and before.data_ptr() in self._places:
                self._memory.release(*self._places.pop(before.data_ptr()))
            place = self._new(content)
        return place.copy_(content.detach()).requires_grad_(content.requires_grad)

    def _new(self, content: Tensor) -> Tensor:
        if content.numel() == 0:
            return torch.empty(content.shape, dtype=content.dtype)
        block, offset = self._memory.block(content.numel() * content.element_size())
        place = torch.frombuffer(block, dtype=content.dtype).view(content.shape)
        self._places[place.data_ptr()] = offset, place.nbytes
        if content.is_cuda:
            # Copies from a GPU into pageable memory take several times as long.
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = runtime.cudaHostRegister(place.data_ptr(), place.nbytes, 0)
            if int(code):
                logger.info("a copy for async_save is in pageable memory (%s): it takes longer", code)
        return place

    def write(self, content: Any, path: Path) -> FileEntry:
        """Writes what `copied` has returned to a new file, as `write_tensors` does; returns its size and hash.

        Raises OSError when it cannot be written.
        """
        with path.open("xb") as file, without_crc32():
            pieces = _Pieces(self._places)
            torch.save(content, pieces)  # type: ignore[arg-type] # torch asks for no more than this
            return FileEntry(*self._writer.write(file, pieces.pieces))


class _Pieces:
    """A file that notes what is written to it: places in shared memory, and copies of what lies elsewhere."""

    def __init__(self, places: dict[int, tuple[int, int]]) -> None:
        self.pieces: list[Piece] = []
        self._places = places

    def write(self, data: bytes | memoryview) -> int:
        size = len(data)
        offset, largest = self._places.get(np.frombuffer(data, np.uint8).ctypes.data, (0, 0))
        self.pieces.append((offset, size) if 0 < size <= largest else bytes(data))
        return size

    def flush(self) -> None:
        """Does nothing: the process that writes brings files to disk."""
