"""The lease of the folders that a run writes: that of its checkpoints, and that of its metrics where it is another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.io.lease import POLL_SECONDS, FolderLease
from megatron.mpu.agreement import on_first_rank, rank_and_size
from megatron.training.shared_folders import require_shared_save
from megatron.training.stop_request import StopRequest


class RunLease:
    """The run's claim to be the one that writes its folders.

    Rank 0 holds it, which alone makes, names and deletes files there that other ranks do not: it outlives a launcher
    that is killed, and says where the run still is.
    """

    def __init__(self, folders: Mapping[Path, str] | None = None) -> None:
        """Prepares the claim on folders, given with the keys that name them.

        Without any, and on ranks other than 0, there is nothing to hold.
        """
        job = os.environ.get("SLURM_JOB_ID")
        what = "train.py" if job is None else f"train.py, Slurm job {job}"
        rank, _ = rank_and_size()
        # A folder before what lies in it, which cannot be made again without it.
        ours = sorted((folders or {}).items()) if rank == 0 else []
        self._leases = [FolderLease(folder, what, key=key) for folder, key in ours]
        self._describe: Callable[[], None] | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Tells whether a heartbeat has found something that `check` should look at; False on ranks other than 0."""
        return any(lease.is_in_doubt for lease in self._leases)

    def acquire(self) -> None:
        """Takes the lease. Collective, and in short rounds, so that no rank waits longer than a collective may take.

        Raises CheckpointError, on all ranks, when another process writes a folder, or it cannot be written.
        """
        while not on_first_rank(lambda: all(lease.is_held or lease.attempt() for lease in self._leases)):
            time.sleep(POLL_SECONDS)

    def check(self) -> bool:
        """Looks whether the folders are still this run's; returns False when one had been removed and is made again.

        Collective. Raises CheckpointError, on all ranks, where `FolderLease.check` does.
        """
        return on_first_rank(self._check)

    def _check(self) -> bool:
        unchanged = [lease.check() for lease in self._leases]
        if not all(unchanged) and self._describe is not None:
            self._describe()
        return all(unchanged)

    @contextmanager
    def describing(self, describe: Callable[[], None]) -> Iterator[None]:
        """Calls `describe`, which writes what the run knows of itself, and again where a folder is made again later.

        On rank 0. Collective. Raises what `describe` raises, on all ranks.
        """
        self._describe = describe
        try:
            on_first_rank(describe)
            yield
        finally:
            # It knows the whole run, of which nothing may be left in memory when a larger model's begins.
            self._describe = None

    def release(self) -> None:
        """Gives the lease back."""
        for lease in self._leases:
            lease.release()


@contextmanager
def run_lease(config: CheckpointConfig, run_folder: Path, stop: StopRequest) -> Iterator[RunLease]:
    """Holds the lease of a run's folders while the body runs, and gives it back also where `stop` ends the process.

    Collective; raises what `RunLease.acquire` and `require_shared_save` raise.
    """
    save = {} if config.save is None else {Path(config.save).resolve(): "save"}
    lease = RunLease({run_folder.resolve(): "log_dir"} | save)
    stop.give_back = lease.release
    stop.lease_is_in_doubt = lambda: lease.is_in_doubt
    try:
        lease.acquire()
        for folder in save:
            require_shared_save(folder)
        yield lease
    finally:
        lease.release()
