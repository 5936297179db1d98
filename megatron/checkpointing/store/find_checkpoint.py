"""Chooses the checkpoint to load, by name or as the newest whole one, and logs each one skipped, with the reason."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path

from megatron.checkpointing.store.checkpoint import (
    CHECKPOINT_NAME,
    Checkpoint,
    checkpoint_name,
    checkpoint_paths,
    read_checkpoint,
    read_latest,
)
from megatron.checkpointing.store.manifest import FileEntry, damage, unlisted
from megatron.config.sections.checkpoint import Verification
from megatron.errors import CheckpointError, os_errors_as
from megatron.io.progress import PeriodicReport
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size

logger = logging.getLogger(__name__)


@os_errors_as(CheckpointError, "the checkpoint folder")
def find_checkpoint(folder: Path, iteration: int | None, level: Verification) -> Checkpoint | None:
    """Finds the checkpoint of `iteration` in `folder`, or the newest whole one; `folder` may be a checkpoint itself.

    Collective: every rank verifies a share of the files, and all find the same. None when there is nothing that could
    be a checkpoint. Raises CheckpointError when the named one is missing or damaged, or when all that there are are.
    """
    named = on_first_rank(partial(_named, folder, iteration))
    if named is not None:
        checkpoint = on_first_rank(partial(_read_named, named))
        problems = problems_of(checkpoint, level)
        if problems:
            on_first_rank(partial(require_still_there, named))
            raise CheckpointError(f"{named} is not whole: {'; '.join(problems)}. Load another one, or restore it.")
        return checkpoint
    candidates, rejected = on_first_rank(partial(survey, folder))
    damaged: list[tuple[int, str]] = []
    for checkpoint in candidates:
        problems = problems_of(checkpoint, level)
        if not problems:
            # When something unreadable was saved is not known; a higher step was most likely saved later.
            _tell(checkpoint, damaged + [found for found in rejected if found[0] > checkpoint.state.iteration])
            return checkpoint
        if on_first_rank(partial(_is_gone, checkpoint.path)):
            logger.warning("%s was removed while it was read, as retention does; passed over", checkpoint.path)
            continue
        damaged.append((checkpoint.state.iteration, f"{checkpoint.path.name}: {'; '.join(problems)}"))
    rejected += damaged
    if rejected:
        reasons = "".join(f"\n  {reason}" for _, reason in sorted(rejected, reverse=True))
        raise CheckpointError(
            f"{folder}: none of its checkpoints is whole.{reasons}\nRestore one of them, or move them away to start "
            "without."
        )
    return None


def newest_checkpoint(folder: Path, level: Verification) -> Checkpoint:
    """Finds the newest whole checkpoint, for callers that need one. Raises CheckpointError when there is none."""
    found = find_checkpoint(folder, None, level)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint. Name a run's folder or a global_stepN folder.")
    return found


def problems_of(checkpoint: Checkpoint, level: Verification) -> list[str]:
    """Lists what keeps a checkpoint from being whole, one sentence each; the same on every rank.

    Collective: each rank looks at a share of the files.
    """
    rank, size = rank_and_size()
    _require_seen_by_all(checkpoint.path)
    files = checkpoint.manifest.files
    by_size = sorted(files, key=lambda name: files[name].size, reverse=True)
    own = _damage_with_progress(checkpoint.path, {name: files[name] for name in by_size[rank::size]}, level)
    if rank == 0:
        own += [f"{name} is not in its manifest" for name in unlisted(checkpoint.path, files)]
    return sorted(chain.from_iterable(gather_objects(own)))


def _require_seen_by_all(path: Path) -> None:
    """Raises CheckpointError where rank 0 sees a checkpoint that other ranks do not. Collective."""
    seen = gather_objects((socket.gethostname(), path.is_dir()))
    blind = [f"{rank} ({host})" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind and seen[0][1]:
        raise CheckpointError(
            f"{path} is on the machine of rank 0 ({seen[0][0]}), and not on that of rank {blind[0]}. Put it on a file "
            "system that all machines mount in the same place, or into a store, with its URL in `load`."
        )


def _damage_with_progress(folder: Path, files: Mapping[str, FileEntry], level: Verification) -> list[str]:
    """Lists damage as `damage` does, with a message now and then."""
    problems = []
    done, total = 0, sum(entry.size for entry in files.values())
    report = PeriodicReport(logger.info)
    for name, entry in files.items():
        problems += damage(folder, {name: entry}, level)
        done += entry.size
        report("%s: verified %.1f of %.1f GiB of this rank's share", folder, done / 2**30, total / 2**30)
    return problems


def readable_checkpoints(folder: Path) -> list[Checkpoint]:
    """Lists the checkpoints in `folder` whose manifest and state can be read, newest save first.

    Looks at no other file.
    """
    return survey(folder)[0]


def _named(folder: Path, iteration: int | None) -> Path | None:
    """Returns the path of the checkpoint that is asked for by name, or None when any will do."""
    match = CHECKPOINT_NAME.fullmatch(folder.resolve().name)
    if match:
        if iteration is not None and int(match.group(1)) != iteration:
            raise CheckpointError(
                f"load: {folder} is not the checkpoint of iteration {iteration}. Correct one of them."
            )
        return folder
    return None if iteration is None else folder / checkpoint_name(iteration)


def _read_named(path: Path) -> Checkpoint:
    if not path.is_dir():
        there = ", ".join(str(iteration) for iteration, _ in sorted(checkpoint_paths(path.parent))) or "none"
        raise CheckpointError(f"{path}: no such checkpoint. Iterations there: {there}.")
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        require_still_there(path)
        raise CheckpointError(
            f"{path} cannot be loaded: {error}. Name a checkpoint that this trainer has written, or convert a foreign "
            "one first."
        ) from error


def _is_gone(path: Path) -> bool:
    """Tells whether a checkpoint that was there is not any more: its run removes old ones by one rename."""
    return not path.is_dir()


def require_still_there(path: Path) -> None:
    """Raises CheckpointError when what looks like damage is a checkpoint that was removed while it was read."""
    if _is_gone(path):
        raise CheckpointError(
            f"{path} was removed while it was read, most likely by its run, which keeps `keep_last_n_checkpoints`. "
            "Load a newer one."
        )


def survey(folder: Path) -> tuple[list[Checkpoint], list[tuple[int, str]]]:
    """Returns the readable checkpoints, newest save first, and (iteration, reason) of what only looks like one."""
    readable, rejected = [], []
    for iteration, path in checkpoint_paths(folder):
        try:
            readable.append(read_checkpoint(path))
        except CheckpointError as error:
            if not _is_gone(path):
                rejected.append((iteration, f"{path.name}: {error}"))
    return sorted(readable, key=lambda found: found.manifest.sequence, reverse=True), rejected


def _tell(chosen: Checkpoint, passed_over: list[tuple[int, str]]) -> None:
    """Warns, on the first rank, of newer checkpoints that are skipped for an older one."""
    if rank_and_size()[0] != 0:
        return
    for _, reason in sorted(passed_over):
        logger.warning("%s: passed over %s. Going back to %s.", chosen.path.parent, reason, chosen.path.name)
    latest = read_latest(chosen.path.parent)
    if latest is not None and latest != chosen.path.name:
        logger.warning(
            "%s: `latest` says %r, but the newest whole checkpoint is %s, which is taken. To go back to an older one, "
            "give `load` and `iteration`.",
            chosen.path.parent,
            latest,
            chosen.path.name,
        )
