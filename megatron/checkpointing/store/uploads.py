"""Sends published checkpoints to an object store, in the background and for as long as it takes."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
import time
from pathlib import Path

from megatron.checkpointing.store.checkpoint import checkpoint_paths
from megatron.checkpointing.store.keep_copy import keep_copy
from megatron.checkpointing.store.remote_folder import RemoteError, RemoteFolder
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

UPLOADING = ".uploading"
"""Folder, in that of the run, of what is still to be sent: links to the files, which retention does not delete."""
FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 300.0
LAST_TRIES = 3
"""Times in a row that the store may fail once the run is over."""


def begin_uploads(config: CheckpointConfig) -> Uploads | None:
    """Begins the uploads of the run that saves as configured, on the rank that publishes; None without `save_remote`.

    Raises EnvironmentSetupError when a package for the URL is missing.
    """
    if config.save_remote is None or config.save is None:
        return None
    return Uploads(RemoteFolder(config.save_remote), Path(config.save).resolve())


def send_leftovers(config: CheckpointConfig) -> None:
    """Sends what earlier starts have not, for a run that has nothing else to do. Raises what `begin_uploads` raises."""
    uploads = begin_uploads(config)
    if uploads is not None:
        uploads.finish()


class Uploads:
    """The uploads of a run, one after the other, on the rank that publishes.

    A store that refuses or cannot be reached costs the run nothing: it is asked again, after longer and longer pauses.
    What a killed run has not sent, the next start sends.
    """

    def __init__(self, remote: RemoteFolder, folder: Path) -> None:
        """Takes up what an earlier start has left in `folder`, the run's."""
        self._remote = remote
        self._folder = folder / UPLOADING
        self._queue: queue.Queue[Path | None] = queue.Queue()
        self._ending = threading.Event()
        self._failed: dict[Path, str] = {}
        self._tries_left = LAST_TRIES
        for _, path in sorted(checkpoint_paths(self._folder)):
            self._queue.put(path)
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Adds a published checkpoint, which may be removed or replaced from now on, to those to be sent."""
        try:
            self._queue.put(keep_copy(checkpoint, self._folder))
        except OSError as error:
            logger.warning("%s is not uploaded: its files cannot be kept for it (%s)", checkpoint, error.strerror)

    def finish(self) -> None:
        """Waits until all is sent, or was tried for the last time; logs what was not sent."""
        self._queue.put(None)
        self._ending.set()
        self._thread.join()
        if not self._failed and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
        for path, reason in self._failed.items():
            logger.error("save_remote: %s is not uploaded: %s. The next start sends %s.", path.name, reason, path)

    def _work(self) -> None:
        while (path := self._queue.get()) is not None:
            self._send(path)

    def _send(self, path: Path) -> None:
        pause = FIRST_PAUSE_SECONDS
        # Queued twice, as a checkpoint that was replaced, it may be sent and gone.
        while path.is_dir():
            try:
                begin = time.monotonic()
                sent = self._remote.upload(path)
            except RemoteError as error:
                if self._ending.is_set():
                    self._tries_left -= 1
                    if self._tries_left <= 0:
                        self._failed[path] = str(error)
                        return
                    time.sleep(FIRST_PAUSE_SECONDS)
                else:
                    logger.warning("%s is not uploaded yet, and will be tried again: %s", path.name, error)
                    self._ending.wait(pause)
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except (CheckpointError, OSError) as error:
                # Its files are gone or damaged, or its place is taken: trying again will not help.
                logger.error("save_remote: %s is not uploaded: %s", path.name, error)
                self._failed[path] = str(error)
                return
            else:
                seconds = time.monotonic() - begin
                self._tries_left = LAST_TRIES
                self._failed.pop(path, None)
                logger.info(
                    "uploaded %s to %s, %.2f GiB, in %.1f s", path.name, self._remote.url, sent / 2**30, seconds
                )
                shutil.rmtree(path, ignore_errors=True)
                return
