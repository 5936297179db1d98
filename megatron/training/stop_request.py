"""Requests to end a run early: signals, and the limit on its duration.

SIGTERM, SIGUSR1 and SIGINT ask for a checkpoint at the next step boundary. The same request reaches ranks at different
moments, or one rank alone, so what counts is what all ranks have agreed on. A second signal ends the process at once.

Before the first step there is nothing to save, and indices, tokenizers and engines take minutes: a signal then ends the
run at once. Whether it came before is for rank 0 to say, as no rank ends a step without it (`early_stop.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import distributed

from megatron.errors import STOPPED_ON_REQUEST
from megatron.training.early_stop import EarlyStop

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
DUPLICATE_SECONDS = 0.5
"""A launcher may pass on a signal that the ranks have got already; within this time it is the same request."""
UNWINDING_SECONDS = (2.0, 0.5)
"""Time that rank 0, and another rank, has to remove temporary files when the run ends before its first step.

The others are most likely waiting in a collective, and are to be gone before rank 0, or they complain of its absence.
"""
GIVING_BACK_SECONDS = 1.0

_END = b"\0"  # no signal has this number


class StopRequest:
    """Request to end the run. `requested` is this rank's own view, `agreed` is common to all ranks.

    The small sum over ranks that carries it carries whether a rank doubts that the run's folders are still its own.
    """

    def __init__(self, duration_in_mins: float | None = None) -> None:
        """Starts the clock of the duration, if there is one."""
        self.agreed = False
        self.early = EarlyStop()
        self.lease_is_in_doubt: Callable[[], bool] = lambda: False
        self.lease_must_be_checked = False
        """Whether any rank was in doubt at the last step; common to all ranks."""
        self.give_back: Callable[[], None] = lambda: None
        """Gives back what other processes would wait for, before this one ends at once."""
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

    def end_process(self, code: int) -> NoReturn:
        """Ends this process at once, in whatever call its main thread is, after giving back what others wait for."""
        giving = threading.Thread(target=self.give_back, daemon=True)
        giving.start()
        giving.join(GIVING_BACK_SECONDS)
        os._exit(code)


@contextmanager
def signals_request(stop: StopRequest) -> Iterator[None]:
    """Turns stop signals into requests while the body runs. Call it in the main thread.

    They are handled in a thread of their own: the main thread may be waiting for another rank inside a collective,
    where Python's handlers do not run, and a second signal must end the process there too. Raises SystemExit with
    STOPPED_ON_REQUEST for one that comes before the first step.
    """
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ours, stop), daemon=True)

    def handle(number: int, frame: object) -> None:
        # Without a Python handler, the listener would not be told of the signal.
        if stop.early.is_due and not ended.is_set():
            raise SystemExit(STOPPED_ON_REQUEST)

    ended = threading.Event()
    handlers = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    stop.early.when_it_comes(lambda: _end_early(stop))
    listener.start()
    try:
        try:
            yield
        except BaseException:
            # Ranks that end cut the connections of those that are still waiting for them.
            if stop.early.has_come:
                raise SystemExit(STOPPED_ON_REQUEST) from None
            raise
        finally:
            ended.set()
    finally:
        stop.early.close()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        # Closing it would not do: loader workers hold copies.
        theirs.send(_END)
        listener.join()
        theirs.close()
        ours.close()


def _listen(source: socket.socket, stop: StopRequest) -> None:
    first: float | None = None
    while (received := source.recv(1)) != _END:
        number = received[0]
        if number not in STOP_SIGNALS or stop.early.has_come:
            continue
        now = time.monotonic()
        name = signal.Signals(number).name
        if first is None:
            first = now
            if stop.early.ask():
                logger.warning("%s before the first step: nothing is to be saved yet, the run ends", name)
                stop.early.come()
            else:
                stop.signal()
                logger.warning("%s: the run will be saved after this step, and end; once more aborts it", name)
        elif now - first > DUPLICATE_SECONDS:
            logger.warning("%s again: aborting", name)
            stop.end_process(128 + number)


def _end_early(stop: StopRequest) -> None:
    """Ends the process: by an exception in the main thread, or without, where that is in a call that takes long."""
    seconds = UNWINDING_SECONDS[os.environ.get("RANK", "0") != "0"]
    fallback = threading.Timer(seconds, stop.end_process, [STOPPED_ON_REQUEST])
    fallback.daemon = True
    fallback.start()
    # To that thread, so that it wakes up where it waits for something.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
