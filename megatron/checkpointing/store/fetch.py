"""Brings checkpoints of an object store to this machine, for `load` and `auto_resume`."""

from __future__ import annotations

import hashlib
import logging
import os
from functools import partial
from pathlib import Path

from megatron.checkpointing.store.checkpoint import CHECKPOINT_NAME, Checkpoint, checkpoint_name, checkpoint_paths
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.manifest import MANIFEST_FILE
from megatron.checkpointing.store.publish import mark_latest
from megatron.checkpointing.store.remote_folder import RemoteError, RemoteFolder
from megatron.config.local_path import is_url
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.io.checkout import hint_at_checkout
from megatron.io.user_cache import user_cache
from megatron.mpu.agreement import gather_objects, on_first_rank, on_first_rank_meanwhile, on_some_ranks_meanwhile

logger = logging.getLogger(__name__)


def configured_checkpoint(config: CheckpointConfig, iteration: int | None = None) -> Checkpoint:
    """Finds the checkpoint that `load`, or else `save`, holds: of `iteration`, of the configured one, or the newest.

    Collective. Raises ConfigError when no folder is named, CheckpointError when it holds nothing whole.
    """
    source = config.load or config.save
    if source is None:
        raise ConfigError("load: no checkpoint is named. Add `load=FOLDER` to the command.")
    iteration = config.iteration if iteration is None else iteration
    folder = local_source(source, iteration, config)
    checkpoint = find_checkpoint(folder, iteration, config.verify_checkpoint)
    if checkpoint is None:
        hint = hint_at_checkout(folder)
        raise CheckpointError(f"{source} holds no checkpoint to read. Name a run's folder with `load=...`.{hint}")
    return checkpoint


def local_source(source: str, iteration: int | None, config: CheckpointConfig) -> Path:
    """Returns the folder that a value of `load` means: of a URL, one on this machine that holds what is asked for.

    That is the checkpoint of `iteration`, or the newest; where the store has none, the folder is empty. Each machine
    fetches it, unless they share `remote_cache_dir`. Collective. Raises CheckpointError when it cannot be had.
    """
    if not is_url(source):
        return Path(source)
    url, step = _split(source, iteration)
    cache = _cache_folder(config) / hashlib.sha256(url.encode()).hexdigest()[:16]
    wanted = on_first_rank(partial(_choose, url, step))
    if wanted is None:
        return cache / "empty"
    step, manifest = wanted
    final = cache / checkpoint_name(step)

    def is_missing() -> bool:
        try:
            return (final / MANIFEST_FILE).read_bytes() != manifest
        except OSError:
            return True

    fetch = partial(_fetch, url, step, cache)
    on_first_rank_meanwhile(fetch)
    # On other machines, the first rank, and then whoever has a disk of its own.
    for is_mine in (os.environ.get("LOCAL_RANK", "0") == "0", True):
        missing = is_missing()
        if any(gather_objects(missing)):
            on_some_ranks_meanwhile(fetch if missing and is_mine else None)
    return final


def restore_newer(config: CheckpointConfig, save: Path, own: Checkpoint | None) -> bool:
    """Fetches the newest checkpoint of `save_remote` into `save` where it is newer than `own`; returns whether it did.

    Collective. Where the store cannot be asked, a run that has a checkpoint of its own goes on from that. Raises
    CheckpointError when it has none, rather than start afresh, and when the store holds another run.
    """
    if config.save_remote is None:
        return False
    url = config.save_remote

    def restore() -> bool:
        remote = RemoteFolder(url)
        try:
            newest = remote.newest()
        except RemoteError as error:
            if own is None:
                raise CheckpointError(
                    f"save_remote: {error}. Without it nobody knows whether this run has begun, and {save} holds no "
                    "checkpoint. Repair the connection, or remove `save_remote` to start afresh."
                ) from error
            logger.warning("save_remote: %s. Going on from %s.", error, own.path)
            return False
        if newest is None:
            return False
        step, manifest = newest
        if own is not None and own.manifest.run_id != manifest.run_id:
            raise CheckpointError(
                f"save_remote: {url} holds checkpoints of another run than {save}. Name another place for this run's."
            )
        if own is not None and own.manifest.sequence >= manifest.sequence:
            return False
        logger.info("auto_resume: fetching %s from %s", checkpoint_name(step), url)
        mark_latest(remote.download(step, save))
        return True

    return on_first_rank_meanwhile(restore)


def require_free(config: CheckpointConfig) -> None:
    """Raises CheckpointError when `save_remote` already holds checkpoints, for a run that goes on from none of them.

    Collective. A store that cannot be asked is no reason not to begin.
    """
    if config.save_remote is None:
        return
    url = config.save_remote

    def look() -> None:
        try:
            steps = RemoteFolder(url).steps()
        except RemoteError as error:
            logger.warning("save_remote: %s. The run begins all the same, and uploads when it can.", error)
            return
        if steps:
            raise CheckpointError(
                f"save_remote: {url} already holds checkpoints of another run. Set `auto_resume: true` to go on with "
                "that run, or name another place."
            )

    on_first_rank_meanwhile(look)


def steps_of(source: str) -> list[int]:
    """Lists the steps of the checkpoints that a folder or a URL holds, in order."""
    if is_url(source):
        return RemoteFolder(source).steps()
    return sorted(iteration for iteration, _ in checkpoint_paths(Path(source)))


def _split(source: str, iteration: int | None) -> tuple[str, int | None]:
    """Returns the run's URL and the step, of which the URL may name one."""
    folder, _, name = source.rstrip("/").rpartition("/")
    match = CHECKPOINT_NAME.fullmatch(name)
    if match is None:
        return source.rstrip("/"), iteration
    if iteration is not None and iteration != int(match.group(1)):
        raise CheckpointError(f"load: {source} is not the checkpoint of iteration {iteration}. Correct one of them.")
    return folder, int(match.group(1))


def _choose(url: str, step: int | None) -> tuple[int, bytes] | None:
    remote = RemoteFolder(url)
    if step is None:
        newest = remote.newest()
        if newest is None:
            return None
        step = newest[0]
    manifest = remote.manifest_bytes(step)
    if manifest is None:
        there = ", ".join(map(str, remote.steps())) or "none"
        raise CheckpointError(f"load: {url} holds no checkpoint of iteration {step}. Iterations there: {there}.")
    return step, manifest


def _fetch(url: str, step: int, cache: Path) -> None:
    path = RemoteFolder(url).download(step, cache)
    logger.info("load: %s of %s is in %s", checkpoint_name(step), url, path)


def _cache_folder(config: CheckpointConfig) -> Path:
    if config.remote_cache_dir is not None:
        return Path(config.remote_cache_dir)
    cache = user_cache()
    if cache is None:
        raise CheckpointError("load: there is no home folder to keep what is fetched. Name one with remote_cache_dir.")
    return cache / "checkpoints"
