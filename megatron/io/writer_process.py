"""Writes files from shared memory, in a process of low priority; started by megatron/io/background_writer.py.

    python -I -S writer_process.py SOCKET MEMORY PARENT

SOCKET and MEMORY are inherited descriptors. It imports nothing but the standard library, so that it starts in a moment
and stays small.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

LENGTH = struct.Struct("!Q")
"""Before every message."""
CHUNK = 2**23
"""Bytes that are hashed and written at a time, while they are in the processor's cache or near it."""
UNFLUSHED = 2**27
"""Bytes after which a file is brought to disk: a long queue delays whoever else waits for the same disk."""
NICENESS = 10
"""Of this process: beside a busy one on the same core it gets a tenth of the time, and all of an idle one."""
PR_SET_PDEATHSIG = 1

Piece = bytes | tuple[int, int]
"""Bytes of a file, or where they lie in the shared memory: offset and size. Bytes are sent as hexadecimal digits."""


def main(channel: socket.socket, memory: int) -> None:
    """Writes one file after the other as asked for, until the other end closes."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, LENGTH.size, 1, socket.MSG_WAITALL)
        if not message:
            return
        (descriptor,) = descriptors
        words = json.loads(received(channel, LENGTH.unpack(message)[0]))
        pieces = [bytes.fromhex(word) if isinstance(word, str) else (word[0], word[1]) for word in words]
        try:
            answer: dict[str, object] = {"written": _write(descriptor, memory, pieces)}
        except OSError as error:
            answer = {"failed": [error.errno, error.strerror]}
        finally:
            os.close(descriptor)
        sent = json.dumps(answer).encode()
        channel.sendall(LENGTH.pack(len(sent)) + sent)


def _write(descriptor: int, memory: int, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Writes a file and brings it to disk; returns its size and SHA-256. Raises OSError."""
    digest, size, unflushed = hashlib.sha256(), 0, 0
    for chunk in _chunks(memory, pieces):
        digest.update(chunk)
        written = 0
        while written < len(chunk):
            written += os.write(descriptor, chunk[written:])
        size += written
        unflushed += written
        if unflushed >= UNFLUSHED:
            os.fdatasync(descriptor)
            unflushed = 0
    os.fsync(descriptor)
    return size, digest.hexdigest()


def _chunks(memory: int, pieces: Sequence[Piece]) -> Iterator[memoryview]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield memoryview(piece)
            continue
        offset, size = piece
        mapped = memoryview(mmap.mmap(memory, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset))
        for begin in range(0, size, CHUNK):
            yield mapped[begin : begin + CHUNK]


def received(channel: socket.socket, size: int) -> bytes:
    """Reads `size` bytes. Raises EOFError when the other end closes before."""
    message = bytearray()
    while len(message) < size:
        part = channel.recv(size - len(message))
        if not part:
            raise EOFError
        message += part
    return bytes(message)


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    # What ends a run is for the run to hear, which may wait for this process to save it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == numbers[2]:
        os.nice(NICENESS)
        main(socket.socket(fileno=numbers[0]), numbers[1])
