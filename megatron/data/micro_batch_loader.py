"""Micro batches, read ahead by worker processes."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Generator, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron.data.order.samplers import MicroBatchSampler
from megatron.errors import DataError


def micro_batches(
    dataset: Dataset[npt.NDArray[np.int64]],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int,
) -> Iterator[Tensor]:
    """This rank's micro batches, int64 [micro_batch_size, seq_length + 1], without end and in the sampler's order.

    The workers (0 reads in this process) leave signals to the parent, so that a run told to stop can still finish its
    step. Draws nothing from the global random generators. A worker's DataError is raised here as it was.
    """
    sampler = MicroBatchSampler(
        num_samples=len(cast(Any, dataset)),
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    loader = DataLoader(
        _Batched(dataset),
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent,
        # Without one of its own, DataLoader takes its workers' seed from the global generator, and a resumed run
        # would draw other dropout masks than an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )
    batches = _raise_errors(loader)
    # Workers that ignore SIGTERM outlive multiprocessing's own exit handler, which would wait for them for ever.
    atexit.register(_close, weakref.ref(batches))
    return batches


class _Batched(Dataset["Tensor | DataError"]):
    """Items are whole micro batches; a DataError is handed over as a value, for DataLoader would rewrite it."""

    def __init__(self, samples: Dataset[npt.NDArray[np.int64]]) -> None:
        self.samples = samples

    def __getitem__(self, items: list[int]) -> Tensor | DataError:
        try:
            return torch.from_numpy(np.stack([self.samples[item] for item in items]))
        except DataError as error:
            return error


def _raise_errors(loader: DataLoader[Tensor | DataError]) -> Generator[Tensor, None, None]:
    iterator = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, DataError):
                raise batch
            yield batch
    finally:
        if loader.num_workers > 0:
            # Left to garbage collection, workers would live as long as a traceback that refers to the iterator.
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _close(batches: weakref.ref[Generator[Tensor, None, None]]) -> None:
    generator = batches()
    if generator is not None:
        generator.close()


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
