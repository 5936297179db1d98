"""A checkpoint in DeepSpeed's universal form, in which a run of any layout and precision takes its share.

<checkpoint>/universal/conversion.json                          what it was made from, and its files
<checkpoint>/universal/mp_rank_00_model_states.pt               the engine's counters, schedule
<checkpoint>/universal/zero/optimizer_state.pt                  what is the same for all parameters
<checkpoint>/universal/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt   one parameter, whole
<checkpoint>/universal.writing-*                                on its way; never read

It is written from what the modules say of their parameters' split (layout.py). DeepSpeed's own converter is told the
split by patterns of names, and unpickles without restraint.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch

from megatron.checkpointing.states.parameter_layout import LayerLayout
from megatron.checkpointing.states.read_optimizer import OptimizerFiles
from megatron.checkpointing.states.weights import checkpoint_layouts
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.manifest import MANIFEST_FILE, FileEntry, damage
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.sections.checkpoint import Verification
from megatron.errors import CheckpointError, os_errors_as
from megatron.io.durable import flush_folder, write_durably
from megatron.io.hashing import file_sha256
from megatron.io.progress import PeriodicReport
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size

logger = logging.getLogger(__name__)

FOLDER = "universal"
CONVERSION_FILE = "conversion.json"
CONVERSION_FORMAT = 1
ENGINE_FILE = "mp_rank_00_model_states.pt"
OPTIMIZER_FILE = "zero/optimizer_state.pt"
COUNTERS = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps", "ds_version")
ABANDONED_AFTER = 3600.0  # seconds without a new file


def universal_form(checkpoint: Checkpoint, level: Verification) -> Path:
    """The folder of the checkpoint's universal form, which is made unless there is a whole one.

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
    conversion = _Conversion(checkpoint)
    try:
        with os_errors_as(CheckpointError, "the checkpoint folder"):
            on_first_rank(conversion.begin)
            for layout in conversion.layouts:
                on_first_rank(partial(conversion.write_layer, layout))
            on_first_rank(conversion.publish)
    except CheckpointError:
        on_first_rank(conversion.remove)
        raise
    return folder


def parameter_folder(universal: Path, engine_name: str) -> Path:
    """Where a parameter lies in the universal form."""
    return universal / "zero" / engine_name


class _Conversion:
    """The work of rank 0; the others keep an object that does nothing."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.layouts = checkpoint_layouts(checkpoint)
        self.final = checkpoint.path / FOLDER
        self.temporary = checkpoint.path / f"{FOLDER}.writing-{secrets.token_hex(4)}"
        self.files: dict[str, FileEntry] = {}
        self.optimizer: OptimizerFiles | None = None
        self.done = 0
        self.started = time.monotonic()
        self.report = PeriodicReport(logger.info)

    def begin(self) -> None:
        """Open the source, remove what is damaged, make the folder, and write what is not of one parameter."""
        logger.info("%s: converting weights and optimizer state, to be loaded in any layout", self.checkpoint.path)
        self.optimizer = OptimizerFiles(self.checkpoint)
        try:
            _remove_abandoned(self.checkpoint.path)
            if self.final.exists():
                shutil.rmtree(self.final)
            (self.temporary / "zero").mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.checkpoint.path} was written in another layout than this run's, and what is converted from it "
                f"cannot be written beside it ({error.strerror}). Copy the checkpoint to a folder that you may write "
                "to, or convert it with tools/ckpts/reshape.py."
            ) from error
        self._write(ENGINE_FILE, engine_counters(self.checkpoint) | {"dp_world_size": 1, "mp_world_size": 1})
        groups: list[dict[str, Any]] = [{}, {}]
        version = {"ds_version": engine_counters(self.checkpoint)["ds_version"]}
        self._write(OPTIMIZER_FILE, self.optimizer.loss_scale | version | {"param_groups": groups})

    def write_layer(self, layout: LayerLayout) -> None:
        """Write one layer's parameters."""
        optimizer = cast(OptimizerFiles, self.optimizer)
        for name, states in optimizer.read_layer(layout).items():
            folder = parameter_folder(Path(), optimizer.engine_names[name])
            (self.temporary / folder).mkdir()
            dim = layout.parameters[name.removeprefix(f"{layout.prefix}.")].shard_dim
            for key, tensor in states.items():
                # A copy, for torch.save writes all of what a view is of.
                content = {"param": tensor.clone()} | ({} if dim is None else {"cat_dim": dim})
                self._write(f"{folder}/{key}.pt", content)
            if optimizer.steps is not None:
                self._write(f"{folder}/step.pt", torch.tensor(optimizer.steps))
        self.done += 1
        self.report("converted %d of %d layers", self.done, len(self.layouts))

    def publish(self) -> None:
        """Give the folder its name, unless another run has been faster: then its folder serves as well."""
        content = {
            "format": CONVERSION_FORMAT,
            "source": file_sha256(self.checkpoint.path / MANIFEST_FILE),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        write_durably(self.temporary / CONVERSION_FILE, json.dumps(content, indent=1) + "\n")
        for folder in (self.temporary, *(path for path in self.temporary.rglob("*") if path.is_dir())):
            flush_folder(folder)
        if self.final.exists():
            self.remove()
            return
        self.temporary.rename(self.final)
        flush_folder(self.final.parent)
        size = sum(entry.size for entry in self.files.values())
        seconds = time.monotonic() - self.started
        logger.info("%s: converted, %.2f GiB in %.1f s; kept for the next time", self.final, size / 2**30, seconds)

    def remove(self) -> None:
        """Delete what a conversion that failed has written."""
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _write(self, name: str, content: Any) -> None:
        try:
            self.files[name] = write_tensors(content, self.temporary / name)
        # torch's writer turns an OSError of the file below it into a RuntimeError of its own.
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.temporary / name} cannot be written: {str(error).splitlines()[0]}. What is converted from "
                f"{self.checkpoint.path} is kept beside it; make room there."
            ) from error


def engine_counters(checkpoint: Checkpoint) -> dict[str, Any]:
    """What DeepSpeed's engine counts and the state of the schedule, the same on all ranks."""
    file = checkpoint.path / ENGINE_FILE
    content = load_tensors(file)
    try:
        return {key: content[key] for key in COUNTERS}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not hold what DeepSpeed 0.19.8 writes ({error!r}).") from error


def _problem(folder: Path, checkpoint: Checkpoint, level: Verification) -> str | None:
    """Why there is no conversion to use; None when there is one, empty when none was made. Collective."""
    files, reason = on_first_rank(partial(_listed, folder, checkpoint))
    if files is None:
        return reason
    rank, size = rank_and_size()
    own = damage(folder, {name: files[name] for name in sorted(files)[rank::size]}, level)
    return next(chain.from_iterable(gather_objects(own)), None)


def _listed(folder: Path, checkpoint: Checkpoint) -> tuple[Mapping[str, FileEntry] | None, str]:
    try:
        content = json.loads((folder / CONVERSION_FILE).read_text(encoding="utf-8"))
        if content["format"] != CONVERSION_FORMAT:
            return None, f"{CONVERSION_FILE} is of another format than {CONVERSION_FORMAT}"
        if content["source"] != file_sha256(checkpoint.path / MANIFEST_FILE):
            return None, "it was converted from something else"
        return {name: FileEntry(**entry) for name, entry in content["files"].items()}, ""
    except FileNotFoundError:
        return None, f"it has no {CONVERSION_FILE}" if folder.exists() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{CONVERSION_FILE} cannot be read ({error})"


def _remove_abandoned(folder: Path) -> None:
    """Delete what killed conversions have left; another run may be at work in one that is still growing."""
    for path in folder.glob(f"{FOLDER}.writing-*"):
        newest = max(entry.stat().st_mtime for entry in (path, *path.rglob("*")))
        if time.time() - newest > ABANDONED_AFTER:
            shutil.rmtree(path)
