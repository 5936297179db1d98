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
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron.config.sections.checkpoint import Verification
from megatron.errors import CheckpointError
from megatron.io.durable import write_durably
from megatron.io.hashing import file_sha256
from megatron.io.json_files import describe_read_error, read_json_object

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1

NO_OTHERS = ConfigDict(extra="forbid")
"""Setting of pydantic for what is read back from a checkpoint: these fields and no others."""
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**31)]


@dataclass(frozen=True)
class FileEntry:
    """One file."""

    __pydantic_config__ = NO_OTHERS

    size: Count
    """[bytes]."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the whole file, hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; the module's docstring says what each field is."""

    __pydantic_config__ = NO_OTHERS

    run_id: str
    sequence: Count
    iteration: Count
    layout: dict[str, Size]
    config: str
    versions: dict[str, str | None]
    files: dict[str, FileEntry]


_MANIFEST = TypeAdapter(Manifest)
_FILES = TypeAdapter(dict[str, FileEntry])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json into `folder`; comes after all files that it names."""
    content = {"format": MANIFEST_FORMAT, **asdict(manifest)}
    write_durably(folder / MANIFEST_FILE, json.dumps(content | {"sha256": _digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json. Raises CheckpointError, with a reason alone, when it is missing, damaged or foreign."""
    try:
        content = read_json_object(folder / MANIFEST_FILE)
        if content.pop("sha256", None) != _digest(content):
            raise CheckpointError(f"{MANIFEST_FILE} is damaged: its SHA-256 differs")
        if content.pop("format", None) != MANIFEST_FORMAT:
            raise CheckpointError(f"{MANIFEST_FILE} is of another format than {MANIFEST_FORMAT}")
        manifest = _MANIFEST.validate_python(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"it has no {MANIFEST_FILE}: not a whole checkpoint of this trainer") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST_FILE} cannot be read ({describe_problem(error)})") from error
    outside = [name for name in manifest.files if not is_file_name(name)]
    if outside:
        raise CheckpointError(f"{MANIFEST_FILE} names {outside[0]!r}, which is not a file of the checkpoint's folder")
    return manifest


def parse_files(content: object) -> dict[str, FileEntry]:
    """Returns a list of files, from JSON. Raises ValueError when it is none."""
    return _FILES.validate_python(content)


def is_file_name(name: str) -> bool:
    """Tells whether a name that was read from a file is one that a folder's file can have, and leads nowhere else."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name and name.isprintable()


def describe_problem(error: OSError | ValueError) -> str:
    """Describes why JSON of a checkpoint cannot be read, in a few words; of many wrong fields the first three."""
    if not isinstance(error, ValidationError):
        return describe_read_error(error)
    found = error.errors(include_url=False)
    shown = [": ".join([*filter(None, [".".join(map(str, each["loc"]))]), each["msg"]]) for each in found[:3]]
    return "; ".join(shown) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


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
