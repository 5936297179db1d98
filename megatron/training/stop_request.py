"""Requests to end a run early: signals, and the limit on its duration.

SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint at the next step boundary. The same request reaches ranks at different
moments, or one rank alone, so what counts is what all ranks have agreed on. A second signal ends the process at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DUPLICATE_SECONDS = 0.5
"""A launcher may pass on a signal that the ranks have got already; within this time it is the same request."""

_END = b"\0"  # no signal has this number


class StopRequest:
    """Request to end the run. `requested` is this rank's own view, `agreed` is common to all ranks."""

    def __init__(self, duration_in_mins: float | None = None) -> None:
        """Starts the clock of the duration, if there is one."""
        self.agreed = False
        self._signalled = threading.Event()
        self._deadline = None if duration_in_mins is None else time.monotonic() + 60.0 * duration_in_mins

    @property
    def requested(self) -> bool:
        """Tells whether a signal has come, or the time is over."""
        return self._signalled.is_set() or (self._deadline is not None and time.monotonic() >= self._deadline)

    def signal(self) -> None:
        """Records that a signal has come."""
        self._signalled.set()

    def agree(self, device: torch.device) -> bool:
        """Tells all ranks of each other's requests; returns whether there is any. Collective."""
        flag = torch.tensor(int(self.requested), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        self.agreed = self.agreed or bool(flag)
        return self.agreed


@contextmanager
def signals_request(stop: StopRequest) -> Iterator[None]:
    """Turns stop signals into requests while the body runs. Call it in the main thread.

    They are handled in a thread of their own: the main thread may be waiting for another rank inside a collective,
    where Python's handlers do not run, and a second signal must end the process there too.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ours, stop), daemon=True)
    handlers = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # Closing it would not do: loader workers hold copies.
        theirs.send(_END)
        listener.join()
        theirs.close()
        ours.close()


def _ignore(number: int, frame: object) -> None:
    """Does nothing; without a Python handler, the listener would not be told of the signal."""


def _listen(source: socket.socket, stop: StopRequest) -> None:
    first: float | None = None
    while (received := source.recv(1)) != _END:
        number = received[0]
        if number not in STOP_SIGNALS:
            continue
        now = time.monotonic()
        name = signal.Signals(number).name
        if first is None:
            first = now
            stop.signal()
            logger.warning("%s: the run will be saved after this step, and end; once more aborts it", name)
        elif now - first > DUPLICATE_SECONDS:
            logger.warning("%s again: aborting", name)
            os._exit(128 + number)
