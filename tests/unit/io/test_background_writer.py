"""Files that a process of low priority writes from shared memory."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.io.background_writer import BackgroundWriter, SharedMemory
from megatron.io.writer_process import CHUNK, NICENESS, Piece

PARENT = """
import os, signal
from megatron.io.background_writer import BackgroundWriter, SharedMemory
writer = BackgroundWriter(SharedMemory())
print(writer.process.pid, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def memory() -> SharedMemory:
    return SharedMemory()


@pytest.fixture(scope="module")
def writer(memory: SharedMemory) -> BackgroundWriter:
    return BackgroundWriter(memory)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_files_hold_bytes_and_shared_memory_in_order(
    writer: BackgroundWriter, memory: SharedMemory, tmp_path: Path
) -> None:
    large, at_large = memory.block(2 * CHUNK + 5)
    small, at_small = memory.block(3)
    large[:] = os.urandom(len(large))
    small[:] = b"abc"
    pieces: list[Piece] = [b"head", (at_small, 3), (at_large, len(large)), b"", (at_small, 2), b"tail"]
    whole = b"head" + b"abc" + large[:] + b"ab" + b"tail"
    for name in ("first", "second"):
        with (tmp_path / name).open("xb") as file:
            assert writer.write(file, pieces) == (len(whole), hashlib.sha256(whole).hexdigest())
        assert (tmp_path / name).read_bytes() == whole


def test_memory_that_is_released_reads_as_zeros(memory: SharedMemory) -> None:
    block, offset = memory.block(10_000)
    block[:] = b"x" * 10_000
    before = os.fstat(memory.descriptor).st_blocks
    memory.release(offset, 10_000)
    assert block[:] == bytes(10_000)
    assert before - 4 * 3 * 2 <= os.fstat(memory.descriptor).st_blocks <= before


def test_a_full_disk_is_told_and_the_next_file_is_written(writer: BackgroundWriter, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full, pytest.raises(OSError, match="No space left") as caught:
        writer.write(full, [b"x"])
    assert caught.value.errno == errno.ENOSPC
    with (tmp_path / "next").open("xb") as file:
        assert writer.write(file, [b"x"])[0] == 1


def test_it_steps_back_and_hears_no_signal_of_the_run(writer: BackgroundWriter, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        writer.process.send_signal(number)
    with (tmp_path / "file").open("xb") as file:
        assert writer.write(file, [b"xy"])[0] == 2
    nice = os.getpriority(os.PRIO_PROCESS, writer.process.pid) - os.getpriority(os.PRIO_PROCESS, 0)
    assert nice == min(NICENESS, 19 - os.getpriority(os.PRIO_PROCESS, 0))


def test_a_process_that_has_ended_is_told(memory: SharedMemory, tmp_path: Path) -> None:
    ended = BackgroundWriter(memory)
    ended.process.kill()
    with (tmp_path / "file").open("xb") as file, pytest.raises(OSError, match=r"has ended \(-9\)"):
        ended.write(file, [b"x"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(number: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = Path(f"/proc/{parent.stdout.readline().strip()}/cmdline")
        wait_until(lambda: b"writer_process" in child.read_bytes())
        parent.send_signal(number)
    wait_until(lambda: not child.exists() or not child.read_bytes())
