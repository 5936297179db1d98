"""Publishes and removes checkpoints so that a kill at any moment leaves whole ones alone.

Written under a hidden name and renamed when it is whole; renamed to a hidden name before it is deleted.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.checkpointing.store.checkpoint import CONFIG_FILE, LATEST, checkpoint_name, read_checkpoint, write_config
from megatron.checkpointing.store.find_checkpoint import readable_checkpoints
from megatron.checkpointing.store.manifest import FileEntry, Manifest, damage, describe_file, write_manifest
from megatron.checkpointing.store.run_state import STATE_FILE, RunState, write_state
from megatron.config.save_schedule import is_kept_for_ever
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.io.durable import flush_folder, replace_durably

logger = logging.getLogger(__name__)

WRITING, REPLACED, REMOVED = "writing", "replaced", "removed"
HIDDEN_NAME = re.compile(rf"\.(global_step\d+)\.({WRITING}|{REPLACED}|{REMOVED})")


def begin(folder: Path, iteration: int) -> Path:
    """Clears what a killed save has left in `folder`, and makes an empty folder to write a checkpoint into."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    temporary = _hidden(folder / checkpoint_name(iteration), WRITING)
    temporary.mkdir()
    return temporary


def put_back_replaced(folder: Path) -> None:
    """Gives checkpoints their name back that were about to be replaced when a save was killed."""
    for path, name, purpose in _leftovers(folder):
        if purpose == REPLACED and not (folder / name).exists():
            path.rename(folder / name)


def clear_leftovers(folder: Path) -> None:
    """Deletes what killed saves have left, but for checkpoints that are put back."""
    put_back_replaced(folder)
    for path, _, _ in _leftovers(folder):
        _delete(path)


def complete(
    temporary: Path,
    files: Mapping[str, FileEntry],
    state: RunState,
    config: RunConfig,
    *,
    run_id: str,
    versions: Mapping[str, str | None],
) -> Path:
    """Makes a checkpoint of the folder `temporary`, which holds `files`, and the latest one; returns its final path.

    State, configuration and manifest are added, then it gets its name. A checkpoint of the same name and run is
    replaced; what else has the name is kept under another, which is logged. `versions` are of the packages and the
    code. Raises CheckpointError when `files` are not there.
    """
    unseen = damage(temporary, files, "sizes")
    if unseen:
        raise CheckpointError(
            f"not all of it shows on the first rank ({unseen[0]}); `save` must lie on a file system that all ranks "
            "share"
        )
    write_state(temporary, state)
    write_config(temporary, config)
    own = {name: describe_file(temporary / name) for name in (STATE_FILE, CONFIG_FILE)}
    sequence = 1 + max((found.manifest.sequence for found in readable_checkpoints(temporary.parent)), default=0)
    write_manifest(
        temporary,
        Manifest(
            run_id=run_id,
            sequence=sequence,
            iteration=state.iteration,
            layout={
                "tensor": state.tensor_parallel_size,
                "pipe": state.pipe_parallel_size,
                "data": state.data_parallel_size,
            },
            config=own[CONFIG_FILE].sha256,
            versions=dict(versions),
            files=dict(sorted({**files, **own}.items())),
        ),
    )
    return _publish(temporary, temporary.parent / checkpoint_name(state.iteration), run_id)


def mark_latest(checkpoint: Path) -> None:
    """Names a checkpoint in the file `latest` beside it."""
    replace_durably(checkpoint.parent / LATEST, f"{checkpoint.name}\n")


def remove_old(folder: Path, config: CheckpointConfig, run_id: str) -> None:
    """Deletes the run's whole checkpoints but the newest `keep_last_n_checkpoints` and those kept for ever.

    Nothing else is touched: neither other runs' checkpoints, nor damaged ones, nor links.
    """
    if config.keep_last_n_checkpoints is None:
        return
    own = [found for found in readable_checkpoints(folder) if found.manifest.run_id == run_id]
    whole = [found for found in own if not damage(found.path, found.manifest.files, "sizes")]
    for checkpoint in whole[config.keep_last_n_checkpoints :]:
        if not is_kept_for_ever(checkpoint.state.iteration, config):
            removed = _hidden(checkpoint.path, REMOVED)
            checkpoint.path.rename(removed)
            _delete(removed)


def _publish(temporary: Path, final: Path, run_id: str) -> Path:
    flush_folder(temporary)
    replaced = _hidden(final, REPLACED)
    if final.exists() or final.is_symlink():
        if _is_of_run(final, run_id):
            final.rename(replaced)
        else:
            _keep_aside(final)
    temporary.rename(final)
    flush_folder(final.parent)
    mark_latest(final)
    if replaced.exists():
        _delete(replaced)
    return final


def _delete(path: Path) -> None:
    """Deletes a hidden folder, or leaves it to the next save where that fails.

    It may fail while another machine has a file of it open; a hidden folder does no harm.
    """
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be deleted (%s); the next save tries again", path, error.strerror)


def _leftovers(folder: Path) -> list[tuple[Path, str, str]]:
    """Lists (path, checkpoint's name, purpose) of the hidden folders that this module makes."""
    if not folder.is_dir():
        return []
    found = [(HIDDEN_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [
        (path, match.group(1), match.group(2))
        for match, path in found
        if match and path.is_dir() and not path.is_symlink()
    ]


def _is_of_run(path: Path, run_id: str) -> bool:
    try:
        return not path.is_symlink() and read_checkpoint(path).manifest.run_id == run_id
    except CheckpointError:
        return False


def _keep_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.kept{number}")).exists():
        number += 1
    path.rename(aside)
    logger.warning("%s is no whole checkpoint of this run, and in the way of one: it is now %s", path, aside.name)


def _hidden(path: Path, purpose: str) -> Path:
    return path.with_name(f".{path.name}.{purpose}")
