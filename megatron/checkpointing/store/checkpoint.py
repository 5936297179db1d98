"""Run folders and the checkpoints in them.

<save>/latest                                 the name of the newest checkpoint, one line (DeepSpeed's convention)
<save>/global_step<N>/manifest.json           what the checkpoint consists of (manifest.py)
<save>/global_step<N>/state.json              where the run stood (run_state.py)
<save>/global_step<N>/config.json             the resolved configuration
<save>/global_step<N>/layer_*-model_*.pt …    DeepSpeed's weights and optimizer states
<save>/.global_step<N>.<writing|replaced|removed>   on its way in or out (publish.py); never read
<save>/.global_step<N>.fetching               on its way from a store (remote_folder.py)
<save>/.uploading/global_step<N>              to be sent to a store: links to the files (uploads.py)
<save>/.lease                                 the process that writes all of this, while it runs (io/lease.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megatron.checkpointing.store.manifest import MANIFEST_FILE, Manifest, damage, describe_problem, read_manifest
from megatron.checkpointing.store.run_state import STATE_FILE, RunState, read_state
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.io.durable import write_durably
from megatron.model.causal_lm import VocabSize

CHECKPOINT_NAME = re.compile(r"global_step(\d+)")
LATEST = "latest"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest and state could be read."""

    path: Path
    state: RunState
    manifest: Manifest

    @property
    def config(self) -> RunConfig:
        """Reads the configuration of the run that wrote it.

        Raises CheckpointError when this version does not know it.
        """
        try:
            return RunConfig.model_validate_json((self.path / CONFIG_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            writer = self.manifest.versions.get("code") or "an unknown commit"
            raise CheckpointError(
                f"{self.path / CONFIG_FILE} cannot be understood: {describe_problem(error)}. The checkpoint was "
                f"written by {writer}. Load it with that version of the code, or, if the file was changed, restore it."
            ) from error

    @property
    def vocab(self) -> VocabSize:
        """Returns the vocabulary that it was trained with."""
        return VocabSize(self.state.vocab_size, self.state.padded_vocab_size)

    @property
    def holds_weights_alone(self) -> bool:
        """Tells whether the optimizer's and the engine's state are missing, so that no run can go on from it."""
        return not any(name.startswith("mp_rank_") for name in self.manifest.files)


def checkpoint_name(iteration: int) -> str:
    """Returns the folder name of the checkpoint after `iteration` steps."""
    return f"global_step{iteration}"


def checkpoint_paths(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yields (iteration, path) of every folder in `folder` that has a checkpoint's name, in no order.

    Links are left out: what they lead to belongs to something else.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = CHECKPOINT_NAME.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            yield int(match.group(1)), path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one global_stepN folder, up to its tensors. Small files are compared with their hashes.

    Raises CheckpointError, with a reason alone, when it is no whole checkpoint of this trainer.
    """
    manifest = read_manifest(path)
    state = read_state(path)
    small = {name: entry for name, entry in manifest.files.items() if name in (STATE_FILE, CONFIG_FILE)}
    problems = damage(path, small, "full") if len(small) == 2 else [f"{MANIFEST_FILE} does not name all files"]
    if problems:
        raise CheckpointError("; ".join(problems))
    if state.tensor_parallel_size > len(manifest.files):
        raise CheckpointError(
            f"it is of {state.tensor_parallel_size:,} tensor-parallel ranks, and has {len(manifest.files)} files"
        )
    if path.resolve().name != checkpoint_name(state.iteration):
        raise CheckpointError(f"it is of step {state.iteration}, which its name does not say")
    return Checkpoint(path, state, manifest)


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes config.json."""
    write_durably(folder / CONFIG_FILE, config.model_dump_json(indent=1) + "\n")


def read_latest(folder: Path) -> str | None:
    """Returns the name in `latest`; None when there is no such file."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
