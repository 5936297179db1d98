"""Micro batches: their order on a rank, the worker processes that read ahead, the tensors for model and loss."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import itertools
import mmap
import shutil
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from megatron.data.dataset_format import MASKED
from megatron.errors import DataError, EnvironmentSetupError, UserError

Targets = tuple[Tensor, Tensor]
"""(labels int64 [B, S], loss mask or weights [B, S]), as the loss takes them."""

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - no file is made there by name
SEMAPHORES_OF_A_QUEUE = 3
"""Each takes a page of shared memory. A loader has a queue for each worker and one for results, and an event."""

MicroBatch = tuple[Tensor, Targets]
"""(inputs int64 [B, S], targets), nested as DeepSpeed's pipeline takes it; the pipeline hands targets on as a tuple."""


class MicroBatchSampler(Sampler[list[int]]):
    """Endless lists of dataset items: this rank's share of each global micro batch, in sequential order.

    A global micro batch is the next micro_batch_size * data_size items, of which rank r takes the r-th contiguous
    block. Past the end of the dataset items start over. `consumed_samples` counts the items of all ranks that earlier
    training has used, so a resumed run goes on where it stopped, whatever its micro batch and number of ranks were.
    """

    def __init__(
        self, num_samples: int, consumed_samples: int, micro_batch_size: int, data_rank: int, data_size: int
    ) -> None:
        self.num_samples = num_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_rank = data_rank
        self.data_size = data_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.consumed_samples + self.data_rank * self.micro_batch_size
        for start in itertools.count(first, self.micro_batch_size * self.data_size):
            yield [item % self.num_samples for item in range(start, start + self.micro_batch_size)]


def micro_batches(
    dataset: Dataset[npt.NDArray[np.int64]],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int,
) -> Iterator[Tensor]:
    """Yields this rank's samples, int64 [B, S + 1] (with labels [B, 2, S + 1]), without end and in the sampler's order.

    The workers (0 reads in this process) leave signals to the parent, so that a run told to stop can still finish its
    step. Draws nothing from the global random generators. A worker's DataError is raised here as it was. Raises
    EnvironmentSetupError when shared memory has no room for the workers' batches, or a worker dies.
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


def to_inputs_and_labels(samples: Tensor, *, eod_token: int | None) -> MicroBatch:
    """Splits samples int64 [B, S + 1] into inputs [B, S] and (labels [B, S], loss mask [B, S]).

    Samples [B, 2, S + 1] bring labels of their own; where those are MASKED, the mask is 0, and the label, which does
    not count, the next token. Otherwise the mask is 1; where `eod_token` is given it is 0 at the positions whose
    *input* is that token (NeoX's eod_mask_loss): what follows the end of a document is not predicted from it.
    """
    tokens = samples[:, 0] if samples.dim() == 3 else samples
    inputs_BS = tokens[:, :-1].contiguous()
    labels_BS = tokens[:, 1:].contiguous()
    mask_BS = torch.ones_like(inputs_BS, dtype=torch.float32)
    if samples.dim() == 3:
        given_BS = samples[:, 1, 1:]
        mask_BS.masked_fill_(given_BS == MASKED, 0.0)
        labels_BS = torch.where(given_BS == MASKED, labels_BS, given_BS)
    if eod_token is not None:
        mask_BS.masked_fill_(inputs_BS == eod_token, 0.0)
    return inputs_BS, (labels_BS, mask_BS)


def sample_digests(tokens: npt.NDArray[np.integer]) -> list[bytes]:
    """Hashes each sample of token ids [B, S + 1], taken as little-endian int64, with SHA-256."""
    return [hashlib.sha256(sample.tobytes()).digest() for sample in np.ascontiguousarray(tokens, dtype="<i8")]


def batch_hash(digests: Iterable[bytes]) -> str:
    """Hashes the samples' digests in the order of the global batch: SHA-256, hexadecimal.

    Two runs with the same hash have trained on the same tokens.
    """
    return hashlib.sha256(b"".join(digests)).hexdigest()


class _Batched(Dataset["Tensor | UserError"]):
    """Items that are whole micro batches. A UserError is handed over as a value, since DataLoader would rewrite it."""

    def __init__(self, samples: Dataset[npt.NDArray[np.int64]]) -> None:
        self.samples = samples

    def __getitem__(self, items: list[int]) -> Tensor | UserError:
        try:
            batch = torch.from_numpy(np.stack([self.samples[item] for item in items]))
        except DataError as error:
            return error
        if get_worker_info() is None:
            return batch
        # The worker's queue would do it in a thread whose errors nobody sees, and the batch would never come.
        try:
            shared: Tensor = batch.share_memory_()  # type: ignore[no-untyped-call]
            return shared
        except (OSError, RuntimeError) as error:
            return _no_shared_memory(str(error))


def _raise_errors(loader: DataLoader[Tensor | UserError]) -> Generator[Tensor, None, None]:
    _require_shared_memory(loader.num_workers)
    try:
        iterator = iter(loader)
    except OSError as error:
        raise EnvironmentSetupError(
            f"the {loader.num_workers} processes that read data ahead cannot be started ({error.strerror}). Set "
            "`num_workers` lower, or to 0, which reads in the training process."
        ) from error
    try:
        while True:
            batch = _next_batch(iterator)
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        if loader.num_workers > 0:
            # Left to garbage collection, workers would live as long as a traceback that refers to the iterator. torch's
            # handler of signals may tell once more of a worker that has died.
            with contextlib.suppress(RuntimeError):
                iterator._shutdown_workers()  # type: ignore[attr-defined]


def _next_batch(iterator: Iterator[Tensor | UserError]) -> Tensor | UserError:
    try:
        return next(iterator)
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        reason = str(error).partition("\n")[0]
        # The last three where it died while it handed a batch over, by a socket in the file system. An error of the
        # dataset comes as its own type, and says in which worker it was caught.
        died = not isinstance(error, RuntimeError) or reason.startswith(("DataLoader worker", "Pin memory thread"))
        if not died or "in DataLoader worker process" in reason:
            raise
        return EnvironmentSetupError(
            f"a process that reads data ahead has died ({reason or type(error).__name__}). Most likely memory was "
            "short; set `num_workers` lower, or to 0, which reads in the training process."
        )


def _require_shared_memory(num_workers: int) -> None:
    """Raises EnvironmentSetupError when there is no room for the semaphores of the workers' queues.

    DataLoader would fail on the way, and once more with a traceback when it is cleared away.
    """
    if num_workers == 0 or not Path(SHARED_MEMORY).is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < mmap.PAGESIZE * SEMAPHORES_OF_A_QUEUE * (num_workers + 4):
        raise _no_shared_memory(f"{free:,} bytes are free")


def _no_shared_memory(reason: str) -> EnvironmentSetupError:
    return EnvironmentSetupError(
        f"{SHARED_MEMORY} has no room for what the processes that read data ahead hand over ({reason}). Enlarge it "
        "(`docker run --shm-size=1g`), or set `num_workers: 0`, which reads in the training process."
    )


def _close(batches: weakref.ref[Generator[Tensor, None, None]]) -> None:
    generator = batches()
    if generator is not None:
        generator.close()


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
