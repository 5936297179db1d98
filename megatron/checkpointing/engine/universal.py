"""Keeps a checkpoint in DeepSpeed's universal form beside it, for runs of other layouts and precisions.

<checkpoint>/universal/conversion.json     what it was made from, and its files
<checkpoint>/universal/...                 the form itself (states/universal_files.py)
<checkpoint>/universal.writing-*           on its way; never read
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path

from megatron.checkpointing.states.parameter_layout import LayerLayout
from megatron.checkpointing.states.read_states import StateReader
from megatron.checkpointing.states.universal_files import UniversalFiles
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.manifest import (
    MANIFEST_FILE,
    FileEntry,
    damage,
    describe_problem,
    is_file_name,
    parse_files,
)
from megatron.config.sections.checkpoint import Verification
from megatron.errors import CheckpointError, os_errors_as
from megatron.io.durable import flush_folder, write_durably
from megatron.io.hashing import file_sha256
from megatron.io.json_files import read_json_object
from megatron.io.progress import PeriodicReport
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size

logger = logging.getLogger(__name__)

FOLDER = "universal"
CONVERSION_FILE = "conversion.json"
CONVERSION_FORMAT = 1
ABANDONED_AFTER = 3600.0  # seconds without a new file


def universal_form(checkpoint: Checkpoint, level: Verification) -> Path:
    """Returns the folder of the checkpoint's universal form, which is made unless there is a whole one.

    Collective: rank 0 converts layer by layer, and no rank waits longer than a layer takes. The form is in the
    checkpoint's folder, goes with it, and is published at once, so that a killed conversion leaves nothing that could
    be taken for one. Raises CheckpointError, on all ranks, when the optimizer's files cannot be read or the folder
    cannot be written.
    """
    folder = checkpoint.path / FOLDER
    problem = _problem(folder, checkpoint, level)
    if problem is None:
        logger.info("%s: its conversion to any layout is there already", checkpoint.path)
        return folder
    if problem:
        logger.warning("%s: %s. It is made again.", folder, problem)
    conversion = Conversion(checkpoint)
    try:
        with os_errors_as(CheckpointError, "the checkpoint folder"):
            on_first_rank(conversion.begin)
            for layout in conversion.reader.layouts:
                on_first_rank(partial(conversion.convert, layout))
            on_first_rank(conversion.publish)
    except CheckpointError:
        on_first_rank(conversion.remove)
        raise
    return folder


class Conversion:
    """One making of the form: the work of rank 0, while the others keep an object that does nothing."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.reader = StateReader(checkpoint)
        self.final = checkpoint.path / FOLDER
        self.temporary = checkpoint.path / f"{FOLDER}.writing-{secrets.token_hex(4)}"
        self.done = 0
        self.started = time.monotonic()
        self.report = PeriodicReport(logger.info)

    def begin(self) -> None:
        """Opens the source, removes what is damaged, and begins the form in a new folder."""
        logger.info("%s: converting weights and optimizer state, to be loaded in any layout", self.checkpoint.path)
        engine = self.reader.engine_state
        if engine is None:
            raise CheckpointError(f"{self.checkpoint.path} holds weights alone, which every layout loads as they are.")
        try:
            _remove_abandoned(self.checkpoint.path)
            if self.final.exists():
                shutil.rmtree(self.final)
            self.temporary.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"{self.checkpoint.path} was written in another layout than this run's, and what is converted from it "
                f"cannot be written beside it ({error.strerror}). Copy the checkpoint to a folder that you may write "
                "to, or convert it with tools/ckpts/reshape.py."
            ) from error
        with self._writing():
            self.files = UniversalFiles(self.temporary, self.checkpoint.config, self.checkpoint.vocab, engine)

    def convert(self, layout: LayerLayout) -> None:
        """Converts one layer."""
        layer = self.reader.read(layout)
        with self._writing():
            self.files.add(layer, layout)
        self.done += 1
        self.report("converted %d of %d layers", self.done, len(self.reader.layouts))

    def publish(self) -> None:
        """Gives the folder its name, unless another run has been faster: then its folder serves as well."""
        content = {
            "format": CONVERSION_FORMAT,
            "source": file_sha256(self.checkpoint.path / MANIFEST_FILE),
            "files": {name: asdict(entry) for name, entry in self.files.written.items()},
        }
        write_durably(self.temporary / CONVERSION_FILE, json.dumps(content, indent=1) + "\n")
        for folder in (self.temporary, *(path for path in self.temporary.rglob("*") if path.is_dir())):
            flush_folder(folder)
        if self.final.exists():
            self.remove()
            return
        self.temporary.rename(self.final)
        flush_folder(self.final.parent)
        size = sum(entry.size for entry in self.files.written.values())
        seconds = time.monotonic() - self.started
        logger.info("%s: converted, %.2f GiB in %.1f s; kept for the next time", self.final, size / 2**30, seconds)

    def remove(self) -> None:
        """Deletes what a conversion that failed has written."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # torch's writer turns an OSError of the file below it into a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.temporary} cannot be written: {str(error).splitlines()[0]}. What is converted from "
                f"{self.checkpoint.path} is kept beside it; make room there."
            ) from error


def _problem(folder: Path, checkpoint: Checkpoint, level: Verification) -> str | None:
    """Returns why no conversion can be used: None when one can, empty when none was made. Collective."""
    files, reason = on_first_rank(partial(_listed, folder, checkpoint))
    if files is None:
        return reason
    rank, size = rank_and_size()
    own = damage(folder, {name: files[name] for name in sorted(files)[rank::size]}, level)
    return next(chain.from_iterable(gather_objects(own)), None)


def _listed(folder: Path, checkpoint: Checkpoint) -> tuple[Mapping[str, FileEntry] | None, str]:
    try:
        content = read_json_object(folder / CONVERSION_FILE)
        if content.get("format") != CONVERSION_FORMAT:
            return None, f"{CONVERSION_FILE} is of another format than {CONVERSION_FORMAT}"
        if content.get("source") != file_sha256(checkpoint.path / MANIFEST_FILE):
            return None, "it was converted from something else"
        files = parse_files(content.get("files"))
    except FileNotFoundError:
        return None, f"it has no {CONVERSION_FILE}" if folder.exists() else ""
    except (OSError, ValueError) as error:
        return None, f"{CONVERSION_FILE} cannot be read ({describe_problem(error)})"
    outside = [name for name in files if not all(map(is_file_name, name.split("/")))]
    return (None, f"{CONVERSION_FILE} names {outside[0]!r}, which leads out of the folder") if outside else (files, "")


def _remove_abandoned(folder: Path) -> None:
    """Deletes what killed conversions have left; another run may be at work in one that is still growing."""
    for path in folder.glob(f"{FOLDER}.writing-*"):
        newest = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
        if time.time() - newest > ABANDONED_AFTER:
            shutil.rmtree(path)
