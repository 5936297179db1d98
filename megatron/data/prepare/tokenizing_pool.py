"""Encodes batches in worker processes, in order, so that the result does not depend on their number.

Workers leave signals to their parent, and end when it is gone, however it ended.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection
from types import TracebackType

from megatron.data.prepare.batches import Batch, EncodedBatch, TokenizeOptions
from megatron.data.prepare.encode_batch import BatchEncoder
from megatron.errors import EnvironmentSetupError

logger = logging.getLogger(__name__)

_BATCHES_AHEAD = 4
"""Batches that wait for each worker."""

SIGNALS_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class TokenizingPool:
    """Worker processes with a tokenizer each; one worker is this process."""

    def __init__(self, options: TokenizeOptions, workers: int) -> None:
        """Builds the tokenizer here, so that its errors come before any worker is started."""
        self.workers = workers
        if workers == 1:
            _use_one_thread()
        self.local = BatchEncoder(options)
        self._executor: ProcessPoolExecutor | None = None

    @property
    def options(self) -> TokenizeOptions:
        """Returns the options in use."""
        return self.local.options

    def use_tokenizer_itself(self) -> None:
        """Replaces a fast encoder that was found to disagree with the tokenizer."""
        self.close()
        self.local = BatchEncoder(dataclasses.replace(self.options, encoder="tokenizers"))

    def encode(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, EncodedBatch]]:
        """Yields each batch, in order, with its tokens. A few batches for each worker are in memory at a time.

        Raises EnvironmentSetupError when a worker dies, and what `BatchEncoder` raises.
        """
        if self.workers == 1:
            yield from ((batch, self.local(batch)) for batch in batches)
            return
        pending: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
        try:
            for batch in batches:
                pending.append((batch, self._submit(batch)))
                batch.contents = []
                if len(pending) > _BATCHES_AHEAD * self.workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise EnvironmentSetupError(
                "a tokenizing process died, most likely for lack of memory. Use fewer --workers, or a smaller "
                "--max-line-bytes, which leaves longer documents out."
            ) from error
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """Ends the workers, after the batches that they are at."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def __enter__(self) -> TokenizingPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, batch: Batch) -> Future[EncodedBatch]:
        if self._executor is None:
            # Spawned, not forked: the caller's progress display may run a thread, and the tokenizers library its own.
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, mp_context=spawn, initializer=_prepare_worker)
        # Which may start a worker. It keeps what is blocked here until it ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_PARENT)
        try:
            sent = Batch(batch.places, batch.contents)
            return self._executor.submit(_encode_in_worker, self.options, sent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _use_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _prepare_worker() -> None:
    _use_one_thread()
    for number in SIGNALS_OF_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


_worker_encoder = cache(BatchEncoder)  # built once in each worker process


def _encode_in_worker(options: TokenizeOptions, batch: Batch) -> EncodedBatch:
    return _worker_encoder(options)(batch)
