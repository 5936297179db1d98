"""manifest.json: what a checkpoint consists of, so that damage to any byte of it can be told.

format      1
run_id      the run that wrote it
sequence    number of the save within the run's folder; the newest checkpoint has the highest
iteration   optimizer steps done
layout      tensor-, pipe- and data-parallel ranks that wrote it
config      SHA-256 of config.json
versions    of the packages and the code that wrote it
files       name -> size [bytes] and SHA-256
sha256      of all of the above, as JSON with sorted keys and no spaces
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.config.sections.checkpoint import Verification
from megatron.errors import CheckpointError
from megatron.io.durable import write_durably
from megatron.io.hashing import file_sha256

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """One file."""

    size: int
    """[bytes]."""

    sha256: str
    """Of the whole file, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; the module's docstring says what each field is."""

    run_id: str
    sequence: int
    iteration: int
    layout: dict[str, int]
    config: str
    versions: dict[str, str | None]
    files: dict[str, FileEntry]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into `folder`; comes after all files that it names."""
    content = {"format": MANIFEST_FORMAT, **asdict(manifest)}
    write_durably(folder / MANIFEST_FILE, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json. Raises CheckpointError, with a reason alone, when it is missing, damaged or foreign."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content):
            raise CheckpointError(f"{MANIFEST_FILE} is damaged: its SHA-256 differs")
        if content.pop("format") != MANIFEST_FORMAT:
            raise CheckpointError(f"{MANIFEST_FILE} is of another format than {MANIFEST_FORMAT}")
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST_FILE}: not a whole checkpoint of this trainer") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read ({error})") from error
    outside = [name for name in files if name == ".." or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{MANIFEST_FILE} names {outside[0]!r}, which is not a file of the checkpoint's folder")
    return manifest


def damage(folder: Path, files: Mapping[str, FileEntry], level: Verification) -> list[str]:
    """Lists the damage to these files of a checkpoint, one sentence each: missing, of another size or content."""
    found = (_damage_of(folder / name, entry, level) for name, entry in files.items())
    return [sentence for sentence in found if sentence is not None]


def describe_file(path: Path) -> FileEntry:
    """Returns size and hash of a file that exists."""
    return FileEntry(path.stat().st_size, file_sha256(path))


def unlisted(folder: Path, names: Iterable[str]) -> list[str]:
    """Lists tensor files in `folder` that are not among `names`, which DeepSpeed would take for its own."""
    return sorted({path.name for path in folder.glob("*.pt")} - set(names))


def _damage_of(path: Path, entry: FileEntry, level: Verification) -> str | None:
    try:
        if path.resolve().parent != path.parent.resolve():
            return f"{path.name} leads out of the folder"
        size = path.stat().st_size
        if size != entry.size:
            return f"{path.name} has {size:,} bytes instead of {entry.size:,}"
        if level == "full" and file_sha256(path) != entry.sha256:
            return f"{path.name} is damaged: its SHA-256 differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
