"""The end of a run that is asked for before its first step: all ranks end at once, as there is nothing to save.

A signal may reach one rank alone, while the others wait for it in a collective, and ranks begin their first step at
different moments. Rank 0 decides, in a thread, through the store of the process group: no step ends without rank 0, so
before it begins no rank has anything to save.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import distributed

POLL_SECONDS = 0.5
ANSWER_SECONDS = 5.0
"""Time that rank 0's thread has to answer, before a rank decides for itself."""
LINGER_SECONDS = (2.2, 1.2)
"""Time between learning of the end and ending, of rank 0 and of another rank.

Every rank has looked by then, and none finds its peers gone before. Rank 0, which keeps the store, leaves last.
"""

_ASKED, _ANSWER = "a rank asks for the end", "what rank 0 says"
_AT_ONCE, _AFTER_A_STEP = b"at once", b"after a step"


class EarlyStop:
    """Decision whether the run ends before its first step; asked for by any rank, taken by rank 0."""

    def __init__(self) -> None:
        """Starts in the time before the first step, with no other rank to ask."""
        self.has_come = False
        """Whether the run ends before its first step."""
        self.is_due = False
        """Whether every rank has had the time to learn of it, so that this one may end."""
        self._begun = False
        self._deciding = threading.Lock()
        self._closed = threading.Event()
        self._end: Callable[[], None] = lambda: None
        self._store: Any | None = None
        self._watcher: threading.Thread | None = None

    def when_it_comes(self, end: Callable[[], None]) -> None:
        """Registers what ends this process; it is called in a thread."""
        self._end = end

    def connect(self) -> None:
        """Lets the ranks of the process group, which exists, hear of each other's requests."""
        if distributed.get_world_size() > 1:
            # A connection of its own: another one is busy while the main thread waits for what it asked for.
            store: Any = distributed.distributed_c10d._get_default_store()  # its annotations lack `clone`
            self._store = store.clone()
            self._watcher = threading.Thread(target=self._watch, args=(self._store,), daemon=True)
            self._watcher.start()

    def begin(self) -> None:
        """Notes that this rank begins to train."""
        with self._deciding:
            self._begun = True

    def close(self) -> None:
        """Ends the time of early ends: a step is done, or the run is over."""
        self._closed.set()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(2 * POLL_SECONDS)
            self._watcher = None

    def ask(self) -> bool:
        """Asks for the end on behalf of a signal to this rank; returns whether the run is to end at once."""
        if self._closed.is_set():
            return False
        answer = None
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # of a store whose rank has gone
                answer = self._answer(self._store)
        return (answer or self._decide()) == _AT_ONCE

    def come(self) -> None:
        """Ends this rank, when the others have had the time to learn of it."""
        with self._deciding:
            first, self.has_come = not self.has_come, True
        if first:
            if self._store is not None:
                time.sleep(LINGER_SECONDS[distributed.get_rank() > 0])
            self.is_due = True
            self._end()

    def _answer(self, store: Any) -> bytes | None:
        """Returns rank 0's decision, which it takes when it is asked; None when it does not answer."""
        if distributed.get_rank() == 0:
            answer = self._decide()
            store.set(_ANSWER, answer)
            return answer
        store.set(_ASKED, b"")
        deadline = time.monotonic() + ANSWER_SECONDS
        while not store.check([_ANSWER]):
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_SECONDS / 5)
        return bytes(store.get(_ANSWER))

    def _decide(self) -> bytes:
        with self._deciding:
            return _AFTER_A_STEP if self._begun else _AT_ONCE

    def _watch(self, store: Any) -> None:
        """Answers on rank 0, and hears the answer on the others, until a step is done."""
        heard = _ASKED if distributed.get_rank() == 0 else _ANSWER
        with contextlib.suppress(RuntimeError):
            while not self._closed.wait(POLL_SECONDS):
                if store.check([heard]):
                    if self._answer(store) == _AT_ONCE:
                        self.come()
                    return
