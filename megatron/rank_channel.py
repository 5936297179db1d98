"""Words between a launcher and the ranks that it has started: one way by variables, the other by a pipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from types import TracebackType

LISTENER_VARIABLE = "MASTER_LISTEN_FD"
"""Tells rank 0 the file descriptor of a socket that listens on MASTER_PORT, which it inherits from its launcher."""

CHANNEL_VARIABLE = "LAUNCHER_CHANNEL"
"""Tells a rank `FD:PID`: the pipe on which it reports why it fails, and the process that has started it."""

LONGEST_REPORT = 60_000
"""Characters of a report that a pipe holds although nobody reads it yet."""

PR_SET_PDEATHSIG = 1

# By name: none of them may be imported here. Others of torch's are RuntimeErrors, known by what gloo and NCCL write.
_CONNECTION_ERRORS = {"DistNetworkError", "DistBackendError", "DistStoreError"}
_CONNECTION_TEXTS = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL error",
    "ncclRemoteError",
    "ncclSystemError",
    "failed to recv",
    "Timed out waiting",
    "Socket Timeout",
)


class RankChannel:
    """A rank's end of the pipe to its launcher."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def inherited(cls) -> RankChannel | None:
        """Takes the channel that the launcher has left in the environment; None in a process that has no launcher.

        From then on, this process ends when its launcher does, however that ends.
        """
        place = os.environ.pop(CHANNEL_VARIABLE, None)
        if place is None:
            return None
        descriptor, launcher = map(int, place.split(":"))
        os.set_inheritable(descriptor, False)
        end_with_parent(launcher, signal.SIGKILL)
        return cls(descriptor)

    def install(self) -> None:
        """Reports exceptions that nobody catches, in place of printing them: the launcher does, in an order."""
        sys.excepthook = self._report_uncaught

    def report(self, error: BaseException, text: str) -> None:
        """Tells the launcher why this rank fails; `text` is what a user is to read of it."""
        words = {"text": text[-LONGEST_REPORT:], "lost_peer": is_lost_peer(error), "time": time.time()}
        try:
            os.write(self._descriptor, json.dumps(words).encode())
        except OSError:
            print(text, file=sys.stderr)

    def _report_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self.report(error, "".join(traceback.format_exception(kind, error, trace)).rstrip())


def is_lost_peer(error: BaseException | None) -> bool:
    """Tells whether an error is, or was caused by, a connection to another rank that has broken."""
    while error is not None:
        if isinstance(error, ConnectionError) or type(error).__name__ in _CONNECTION_ERRORS:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _CONNECTION_TEXTS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def end_with_parent(parent: int, number: int) -> None:
    """Asks the kernel to send this process a signal when its parent has ended. Only Linux has such a thing."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    # It may have ended before that.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
