"""Checkpoints in an object store, or wherever else fsspec has a file system: each is whole there, or does not count.

<url>/global_step<N>/<files of the manifest>    each appears when it is whole
<url>/global_step<N>/manifest.json              comes last, and goes first where a checkpoint is replaced

Nothing else there is read, and nothing is ever deleted. Credentials come from where the store's package looks for them
by itself: the environment, or files of the user's.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.checkpointing.store.checkpoint import CHECKPOINT_NAME, checkpoint_name
from megatron.checkpointing.store.manifest import MANIFEST_FILE, FileEntry, Manifest, damage, read_manifest
from megatron.config.redaction import redact_urls
from megatron.errors import CheckpointError, EnvironmentSetupError, os_errors_as
from megatron.io.durable import flush_folder
from megatron.io.json_files import MAX_BYTES
from megatron.registry import install_extra, require

logger = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 24
"""Bytes that are read and sent at a time."""
TRIES = 3
"""Times that a checkpoint's file is fetched before the fetch fails."""
PAUSE_SECONDS = 1.0
FETCHING = "fetching"


class RemoteError(CheckpointError):
    """A store cannot be reached, or refuses; what is tried again later may succeed."""


class RemoteFolder:
    """The checkpoints under one URL."""

    def __init__(self, url: str) -> None:
        """Opens no connection yet. Raises EnvironmentSetupError when a package for such URLs is missing."""
        self.url = url.rstrip("/")
        fsspec = require("fsspec", self.url.partition("://")[0] + "://", install_extra("remote"))
        try:
            with _errors_of(self.url):
                self._files, root = fsspec.core.url_to_fs(self.url)
        except RemoteError as error:
            if isinstance(error.__cause__, ImportError | ValueError):
                raise EnvironmentSetupError(
                    f"{self.url}: {_words(error.__cause__)}. {install_extra('remote')} It has s3fs; other stores have "
                    "packages of their own."
                ) from error
            raise
        self._root = root.rstrip("/")

    def steps(self) -> list[int]:
        """Lists the steps of the whole checkpoints, in order. Raises RemoteError when the store cannot be asked."""
        with _errors_of(self.url):
            self._files.invalidate_cache()
            try:
                names = [str(name).rstrip("/").rsplit("/", 1)[-1] for name in self._files.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []
            steps = [int(match.group(1)) for name in names if (match := CHECKPOINT_NAME.fullmatch(name))]
            return sorted(step for step in steps if self._files.exists(self._path(step, MANIFEST_FILE)))

    def manifest(self, step: int) -> Manifest | None:
        """Reads the manifest of a checkpoint; None where there is no whole one.

        Raises RemoteError when the store cannot be asked, CheckpointError when the manifest is damaged.
        """
        content = self.manifest_bytes(step)
        return None if content is None else _parse(content)

    def manifest_bytes(self, step: int) -> bytes | None:
        """Reads the manifest of a checkpoint as it is; None where there is no whole one. Raises RemoteError."""
        path = self._path(step, MANIFEST_FILE)
        with _errors_of(self.url):
            self._files.invalidate_cache()
            try:
                if self._files.size(path) > MAX_BYTES:
                    raise CheckpointError(f"{self.url}: {path} is larger than {MAX_BYTES:,} bytes")
                return bytes(self._files.cat_file(path))
            except FileNotFoundError:
                return None

    def newest(self) -> tuple[int, Manifest] | None:
        """Returns step and manifest of the checkpoint that was saved last; None where there is none.

        Raises what `manifest` raises.
        """
        found = [(step, manifest) for step in self.steps() if (manifest := self.manifest(step)) is not None]
        return max(found, key=lambda one: one[1].sequence, default=None)

    def upload(self, checkpoint: Path) -> int:
        """Sends a checkpoint of this machine, unless the same is there; returns the bytes sent.

        Each file is compared with its manifest while it is read. Raises RemoteError when the store refuses or cannot be
        reached, CheckpointError when a file has changed since it was saved, or another run's checkpoint is there.
        """
        manifest = read_manifest(checkpoint)
        content = (checkpoint / MANIFEST_FILE).read_bytes()
        target = self._path(manifest.iteration, MANIFEST_FILE)
        with _errors_of(self.url):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        there = self.manifest_bytes(manifest.iteration)
        if there == content:
            return 0
        if there is not None:
            if _parse(there).run_id != manifest.run_id:
                raise CheckpointError(
                    f"{self.url} holds {checkpoint.name} of another run, which is not replaced. Name another place."
                )
            with _errors_of(self.url):
                self._files.rm_file(target)
        for name, entry in manifest.files.items():
            self._send(checkpoint / name, self._path(manifest.iteration, name), entry)
        with _errors_of(self.url):
            for name, entry in manifest.files.items():
                size = self._files.size(self._path(manifest.iteration, name))
                if size != entry.size:
                    raise RemoteError(f"{self.url}: {name} has {size:,} bytes there instead of {entry.size:,}")
            with self._written(target) as file:
                file.write(content)
        return sum(entry.size for entry in manifest.files.values())

    def download(self, step: int, folder: Path) -> Path:
        """Fetches a checkpoint into `folder`, where it appears when it is whole and verified; returns its path.

        One that is there already stays. What an earlier try has fetched is used. Raises RemoteError when the store
        cannot be reached, CheckpointError when there is no such checkpoint, a file is damaged or does not fit on the
        disk.
        """
        final = folder / checkpoint_name(step)
        temporary = folder / f".{final.name}.{FETCHING}"
        with os_errors_as(CheckpointError, str(folder)):
            temporary.mkdir(parents=True, exist_ok=True)
            content = self.manifest_bytes(step)
            if content is None:
                raise CheckpointError(f"{self.url} holds no whole checkpoint of step {step}.")
            (temporary / MANIFEST_FILE).write_bytes(content)
            manifest = read_manifest(temporary)
            if _is_there(final, temporary):
                shutil.rmtree(temporary)
                return final
            missing = {
                name: entry for name, entry in manifest.files.items() if damage(temporary, {name: entry}, "full")
            }
            _require_room(folder, sum(entry.size for entry in missing.values()), self.url)
            for name, entry in missing.items():
                self._fetch(step, name, entry, temporary)
            flush_folder(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            flush_folder(folder)
        return final

    def _path(self, step: int, name: str) -> str:
        return f"{self._root}/{checkpoint_name(step)}/{name}"

    def _send(self, source: Path, target: str, entry: FileEntry) -> None:
        seen = hashlib.sha256()
        with _errors_of(self.url), source.open("rb") as file, self._written(target) as remote:
            while block := file.read(BLOCK_BYTES):
                seen.update(block)
                remote.write(block)
            if seen.hexdigest() != entry.sha256:
                raise CheckpointError(f"{source} is not what its manifest says: it was changed, or its disk is bad.")

    @contextmanager
    def _written(self, path: str) -> Iterator[Any]:
        """Yields a file that appears at its end; after an exception it does not, unlike one that is merely closed."""
        file = self._files.open(path, "wb", autocommit=False)
        try:
            yield file
            file.close()
        except BaseException:
            file.discard()
            raise
        file.commit()

    def _fetch(self, step: int, name: str, entry: FileEntry, folder: Path) -> None:
        for remaining in reversed(range(TRIES)):
            try:
                with _errors_of(self.url):
                    self._files.get_file(self._path(step, name), str(folder / name))
                problems = damage(folder, {name: entry}, "full")
                if not problems:
                    return
                raise RemoteError(f"{self.url}/{checkpoint_name(step)}: {problems[0]}")
            except RemoteError as error:
                if not remaining:
                    raise
                logger.warning("%s; once more", error)
                time.sleep(PAUSE_SECONDS)


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """Raises RemoteError for whatever a file system's package raises: those of most are of no common type."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise RemoteError(f"{redact_urls(url)}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    lines = redact_urls(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _parse(manifest: bytes) -> Manifest:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST_FILE).write_bytes(manifest)
        return read_manifest(Path(folder))


def _is_there(final: Path, fetched: Path) -> bool:
    try:
        same = (final / MANIFEST_FILE).read_bytes() == (fetched / MANIFEST_FILE).read_bytes()
        return same and not damage(final, read_manifest(final).files, "full")
    except (OSError, CheckpointError):
        return False


def _require_room(folder: Path, size: int, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{folder} has {free / 2**30:.1f} GiB free, and what is to be fetched from {url} needs {size / 2**30:.1f}. "
            "Make room, or name another folder."
        )
