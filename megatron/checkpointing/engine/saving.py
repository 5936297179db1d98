"""Saves a run through DeepSpeed's engine, at the steps of its schedule: while training waits, or beside it."""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed

from megatron.checkpointing.engine.engine_files import EngineFiles, SnapshotFiles
from megatron.checkpointing.states import universal_info
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.publish import begin, complete, remove_old
from megatron.checkpointing.store.run_state import RunState
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError, os_errors_as
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import gather_objects, on_first_rank

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


class Saver:
    """The saves of a run, one at a time.

    With `async_save` a save copies what it is to write into this rank's memory, and a thread writes it. The thread
    takes no part in collectives: the checkpoint is published between two steps, once all ranks have written, or before
    the next save at the latest. Until then it has a hidden name, and a crash leaves the one before as the newest.
    """

    def __init__(
        self,
        engine: PipelineEngine,
        config: RunConfig,
        *,
        run_id: str,
        versions: Mapping[str, str | None],
        folder_is_ours: Callable[[], bool] = lambda: True,
        published: Callable[[Path], None] = lambda checkpoint: None,
    ) -> None:
        """Takes what every save needs.

        `versions` are of the packages and the code, for the manifest. `folder_is_ours` is asked before a save and
        before its publishing, collectively: it raises when another run has the folder, and returns False when the
        folder was removed and is made again. `published` is told, on rank 0, of each checkpoint before old
        ones are removed.
        """
        self.engine = engine
        self.config = config
        self.run_id = run_id
        self.versions = versions
        self.folder_is_ours = folder_is_ours
        self.published = published
        self._pending: _Save | None = None

    @property
    def is_saving(self) -> bool:
        """Tells whether a save is not published yet; the same on every rank."""
        return self._pending is not None

    def save(self, state: RunState, *, wait: bool) -> None:
        """Saves a checkpoint; with `wait`, or unless saves are asynchronous, it is published when this returns.

        Collective. A kill or a failure at any moment leaves every earlier checkpoint and `latest` whole. Where the
        folder is removed while a save is waited for, it is saved once more. Raises CheckpointError, on all ranks, when
        a rank cannot write, also for the save before, if that was still being written.
        """
        if self._pending is not None:
            if not self._pending.is_written_everywhere():
                logger.info("the save of step %d waits for the one before, which is being written", state.iteration)
            self.finish()
        self.folder_is_ours()
        self._pending = _Save(self.engine, state, self.config)
        if (wait or not self.config.checkpoint.async_save) and not self.finish():
            self._pending = _Save(self.engine, state, self.config)
            self.finish()

    def publish_if_written(self) -> None:
        """Publishes a save that all ranks have written by now. Collective; raises what `save` raises."""
        if self._pending is not None and self._pending.is_written_everywhere():
            self.finish()

    def finish(self) -> bool:
        """Waits for a save that is being written, and publishes it; returns False when it was removed meanwhile.

        Collective; raises what `save` raises.
        """
        save, self._pending = self._pending, None
        if save is None:
            return True
        save.wait()
        ours = self.folder_is_ours()
        if ours:
            save.publish(self.run_id, self.versions, self.published)
            ours = self.folder_is_ours()
        if not ours:
            logger.info("the checkpoint of step %d was removed while it was saved", save.state.iteration)
        return ours


class _Save:
    """A checkpoint on its way."""

    def __init__(self, engine: PipelineEngine, state: RunState, config: RunConfig) -> None:
        """Writes it, or begins to. Collective."""
        if config.checkpoint.save is None:
            raise CheckpointError("save: no folder is configured to save checkpoints in.")
        self.config = config
        self.state = state
        self.device = engine.device
        self.folder = Path(config.checkpoint.save).resolve()
        self.files: EngineFiles = engine.checkpoint_engine
        self.seconds_waited = 0.0
        self.started = time.perf_counter()
        with self._training_waits():
            with os_errors_as(CheckpointError, "the checkpoint folder"):
                self.temporary = on_first_rank(partial(begin, self.folder, state.iteration))
            if not hasattr(engine.module, universal_info.KEY):
                vocab = VocabSize(state.vocab_size, state.padded_vocab_size)
                setattr(engine.module, universal_info.KEY, universal_info.universal_info(config, vocab))
            engine.save_checkpoint(str(self.folder), tag=self.temporary.name, save_latest=False)
        self.thread: threading.Thread | None = None
        if isinstance(self.files, SnapshotFiles):
            # A daemon, so that a run which fails does not stay alive to write what it cannot publish.
            self.thread = threading.Thread(target=self.files.write, name="checkpoint writer", daemon=True)
            self.thread.start()

    @property
    def is_written(self) -> bool:
        """Tells whether this rank has written its files, or failed to."""
        return self.thread is None or not self.thread.is_alive()

    def is_written_everywhere(self) -> bool:
        """Tells whether all ranks have written their files, or failed to. Collective."""
        with self._training_waits():
            writing = torch.tensor(not self.is_written, dtype=torch.int32, device=self.device)
            distributed.all_reduce(writing, op=distributed.ReduceOp.MAX)
            return not writing.item()

    def wait(self) -> None:
        """Waits until this rank has written its files, or failed to."""
        with self._training_waits():
            if self.thread is not None:
                self.thread.join()

    def publish(self, run_id: str, versions: Mapping[str, str | None], published: Callable[[Path], None]) -> Path:
        """Gives the checkpoint its name once all ranks have waited for it, and removes old ones. Collective."""
        with self._training_waits():
            try:
                written = _gathered(self.files)
                named = partial(complete, run_id=run_id, versions=versions)
                with os_errors_as(CheckpointError, "the checkpoint folder"):
                    final = on_first_rank(partial(named, self.temporary, written, self.state, self.config))
            except CheckpointError as error:
                on_first_rank(partial(shutil.rmtree, self.temporary, ignore_errors=True))
                raise CheckpointError(
                    f"save: the checkpoint of step {self.state.iteration} could not be written to {self.folder}: "
                    f"{error}. Earlier ones are as they were. Make room or repair the disk, then go on with "
                    "`auto_resume: true`."
                ) from error
            with os_errors_as(CheckpointError, "the checkpoint folder"):
                on_first_rank(partial(published, final))
                on_first_rank(partial(remove_old, self.folder, self.config.checkpoint, run_id))
        logger.info(
            "saved %s, %.2f GiB, in %.1f s; training waited %.2f s of them",
            final,
            sum(entry.size for entry in written.values()) / 2**30,
            time.perf_counter() - self.started,
            self.seconds_waited,
        )
        return final

    @contextmanager
    def _training_waits(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds_waited += time.perf_counter() - begin


def _gathered(files: EngineFiles) -> dict[str, FileEntry]:
    """Returns all ranks' files. Raises CheckpointError, on all ranks, when one of them could not write."""
    try:
        own: dict[str, FileEntry] | str = files.taken()
    except CheckpointError as error:
        own = str(error)
    reports = gather_objects(own)
    failures = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
    if failures:
        raise CheckpointError("; ".join(failures))
    return dict(itertools.chain.from_iterable(report.items() for report in reports if not isinstance(report, str)))
