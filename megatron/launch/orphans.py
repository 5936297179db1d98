"""Leaves no process behind: what a rank has started, and did not end, is ended after it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 5.0
"""Time that such a process has to end by itself: loader workers look for their parent every five seconds."""


@contextlib.contextmanager
def no_orphans() -> Iterator[None]:
    """Ends every process that the body's processes have left. Only Linux can tell which those are.

    It ends all children of this process, so that it is for a program of which the ranks are all.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (children := _children()) and time.monotonic() < deadline + PATIENCE_SECONDS:
            for pid in children:
                with contextlib.suppress(OSError):
                    if time.monotonic() > deadline:
                        os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(POLL_SECONDS)


def _children() -> list[int]:
    """Lists the children of this process that still run, or that nobody has waited for."""
    found = []
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in file.read_text().split()]
    return found
