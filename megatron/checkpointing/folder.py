"""What a checkpoint folder is: names, the state beside the weights, which one is the latest, which ones may go.

    <save>/latest                                 the name of the newest checkpoint, one line (DeepSpeed's convention)
    <save>/global_step<N>/state.json              RunState
    <save>/global_step<N>/config.json             the resolved configuration
    <save>/global_step<N>/layer_*-model_*.pt …    DeepSpeed's weights and optimizer states

A checkpoint is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.config.run import RunConfig
from megatron.errors import CheckpointError

CHECKPOINT_NAME = re.compile(r"global_step(\d+)")
LATEST = "latest"
STATE_FILE = "state.json"
CONFIG_FILE = "config.json"
STATE_FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands, apart from weights and optimizer state."""

    iteration: int
    """Optimizer steps done [steps]."""

    consumed_train_samples: int
    """Training samples read by all ranks together [samples]."""

    consumed_valid_samples: int
    """Validation samples read by all ranks together [samples]."""

    train_index_samples: int
    """Samples that the training index was built for. The order depends on it, so a resumed run builds the same index
    whatever its train_iters [samples]."""

    valid_index_samples: int
    """The same for validation [samples]."""

    tensor_parallel_size: int
    """Tensor-parallel ranks that wrote the checkpoint."""

    pipe_parallel_size: int
    """Pipeline stages that wrote the checkpoint."""

    data_parallel_size: int
    """Data-parallel ranks that wrote the checkpoint."""

    vocab_size: int
    """Tokens that the tokenizer knows."""

    padded_vocab_size: int
    """Rows of the embedding."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: RunState

    @property
    def config(self) -> RunConfig:
        """The configuration of the run that wrote it."""
        return RunConfig.model_validate_json((self.path / CONFIG_FILE).read_text())


def checkpoint_name(iteration: int) -> str:
    """Folder name of the checkpoint after `iteration` steps."""
    return f"global_step{iteration}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, path) of every checkpoint in `folder`, oldest first; temporary ones do not count."""
    if not folder.is_dir():
        return []
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def find_checkpoint(folder: Path, iteration: int | None) -> Checkpoint | None:
    """The checkpoint that a run should start from: that of `iteration`, or the one that `latest` names.

    `folder` is a run's checkpoint folder, or one global_stepN folder itself. None when there is no checkpoint at all.
    Raises CheckpointError for a checkpoint that is named but missing or damaged.
    """
    if CHECKPOINT_NAME.fullmatch(folder.name) and (folder / STATE_FILE).is_file():
        return read_checkpoint(folder)
    if iteration is not None:
        path = folder / checkpoint_name(iteration)
        if not path.is_dir():
            there = ", ".join(str(number) for number, _ in list_checkpoints(folder)) or "none"
            raise CheckpointError(f"{path}: no checkpoint of iteration {iteration}. Iterations there: {there}.")
        return read_checkpoint(path)
    latest = folder / LATEST
    if not latest.is_file():
        return None
    name = latest.read_text().strip()
    if not CHECKPOINT_NAME.fullmatch(name):
        raise CheckpointError(f"{latest}: {name!r} is not the name of a checkpoint (global_stepN).")
    return read_checkpoint(folder / name)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the state of one global_stepN folder. Raises CheckpointError when it is missing or not readable."""
    try:
        state = json.loads((path / STATE_FILE).read_text())
        if state.pop("format", None) != STATE_FORMAT:
            raise CheckpointError(f"{path / STATE_FILE}: written in another format than {STATE_FORMAT}.")
        return Checkpoint(path, RunState(**state))
    except (OSError, json.JSONDecodeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of this trainer ({error}). Name a folder that holds global_stepN folders "
            "written by it, or convert a foreign checkpoint first."
        ) from error


def write_state(path: Path, state: RunState, config: RunConfig) -> None:
    """Write what belongs beside the weights into the folder `path`."""
    (path / STATE_FILE).write_text(json.dumps({"format": STATE_FORMAT, **asdict(state)}, indent=1) + "\n")
    (path / CONFIG_FILE).write_text(config.model_dump_json(indent=1) + "\n")


def publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name and make it the latest. An older one of the same name is replaced."""
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    pointer = final.parent / f"{LATEST}.tmp"
    pointer.write_text(f"{final.name}\n")
    pointer.replace(final.parent / LATEST)


def remove_old(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints in `folder`."""
    for _, path in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(path)


def require_writable(folder: Path) -> None:
    """Create `folder` and see that files can be made in it. Raises CheckpointError before a run spends any time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"save: {folder} cannot be written ({error.strerror}). Name a folder that you may write to, or give "
            "yourself the permission."
        ) from error
