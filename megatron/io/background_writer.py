"""Files that another process writes, of low priority, from memory that it shares with this one.

A thread that writes competes with the computation for Python's lock and for processor cores: whenever it loses its core
while it holds the lock, everything waits. A process has a lock and a priority of its own.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from megatron.io.writer_process import LENGTH, Piece, received

PROGRAM = Path(__file__).with_name("writer_process.py")


class SharedMemory:
    """Memory in blocks of whole pages, which processes share that have its descriptor.

    It belongs to no file system: containers often limit theirs for shared memory to a few megabytes.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("checkpoint")
        self._size = 0

    def __del__(self) -> None:
        os.close(self.descriptor)

    def block(self, size: int) -> tuple[mmap.mmap, int]:
        """Maps a new block of `size` bytes, at least one; returns it and its offset. Raises OSError without memory."""
        offset = self._size
        os.ftruncate(self.descriptor, offset + size)
        self._size = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        return mmap.mmap(self.descriptor, size, offset=offset), offset

    def release(self, offset: int, size: int) -> None:
        """Gives a block's memory back; whoever still reads it finds zeros."""
        mmap.mmap(self.descriptor, size, offset=offset).madvise(mmap.MADV_REMOVE)


class BackgroundWriter:
    """A process that writes files from a `SharedMemory`, one at a time; it ends with this one."""

    def __init__(self, memory: SharedMemory) -> None:
        """Starts it. The thread that does so must outlive it. Raises OSError where no process can be started."""
        self._channel, theirs = socket.socketpair()
        words = [sys.executable, "-I", "-S", str(PROGRAM), theirs.fileno(), memory.descriptor, os.getpid()]
        with theirs:
            self.process = subprocess.Popen(
                [str(word) for word in words], pass_fds=(theirs.fileno(), memory.descriptor), stdin=subprocess.DEVNULL
            )
        weakref.finalize(self, _end, self.process, self._channel)

    def write(self, file: BinaryIO, pieces: Sequence[Piece]) -> tuple[int, str]:
        """Writes a new file and brings it to disk; returns its size and SHA-256 once that is done.

        Raises OSError when it cannot be written, or when the process has ended.
        """
        message = json.dumps([piece.hex() if isinstance(piece, bytes) else piece for piece in pieces]).encode()
        try:
            socket.send_fds(self._channel, [LENGTH.pack(len(message))], [file.fileno()])
            self._channel.sendall(message)
            (length,) = LENGTH.unpack(received(self._channel, LENGTH.size))
            answer = json.loads(received(self._channel, length))
        except (ConnectionError, EOFError) as error:
            code = self.process.wait()
            raise OSError(0, f"the process that writes checkpoints has ended ({code})") from error
        if "failed" in answer:
            raise OSError(*answer["failed"])
        size, digest = answer["written"]
        return size, digest


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    process.kill()
    process.wait()
