"""Progress of a run of preprocess_data.py, beside its output: `<output-prefix>.progress.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.data.dataset_format import Position
from megatron.errors import DataError
from megatron.io.durable import flush_folder, replace_durably
from megatron.io.json_files import describe_read_error, read_json_object

_FORMAT_VERSION = 1


@dataclass
class Tally:
    """Counts of the work done so far."""

    documents: int = 0
    """Documents read, without malformed ones."""

    empty: int = 0
    """Texts without a token; they are left out."""

    bad: int = 0
    """Malformed documents; they are left out."""

    bad_lines: list[str] = field(default_factory=list)
    """Place and reason of malformed documents, of the first ones."""

    written: dict[str, int] = field(default_factory=dict)
    """Documents written, by dataset."""

    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens written, by dataset."""

    text_bytes: int = 0
    """Of the texts as UTF-8 [bytes]."""

    longest: int = 0
    """Tokens of the longest document."""

    longest_place: str = ""

    bytes_read: int = 0
    """Of the inputs as they lie on disk [bytes]."""


@dataclass
class Progress:
    """State from which a run goes on."""

    request: dict[str, Any]
    """What was asked for; another request does not go on from here."""

    input: int = 0
    """Number of the input that is being read."""

    document: int = -1
    """Number of its last document that has been written; -1 before the first."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Facts of the inputs that have been read to their end, and of the one that is being read."""

    positions: dict[str, Position] = field(default_factory=dict)
    """Positions of the writers, by dataset."""

    tally: Tally = field(default_factory=Tally)

    finished: dict[str, Any] | None = None
    """Manifests of the datasets, once their files are whole; they only have to be given their names."""

    def write(self, path: Path) -> None:
        """Brings the state to disk. Raises DataError when it cannot be written."""
        try:
            replace_durably(path, json.dumps({"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}) + "\n")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}). Make room, and run the same command again: it goes on "
                "from its last save."
            ) from error


def progress_file(output_prefix: Path) -> Path:
    """Returns the path of the progress of an output."""
    return output_prefix.with_name(f"{output_prefix.name}.progress.json")


def read_progress(path: Path) -> Progress | None:
    """Reads the state of an earlier run; None without one. Raises DataError when it is damaged."""
    if not path.exists():
        return None
    try:
        content = read_json_object(path, 1 << 30)
        if content.pop("format_version", None) != _FORMAT_VERSION:
            raise ValueError(f"is not a progress of version {_FORMAT_VERSION}")
        return Progress(**{**content, "tally": Tally(**content["tally"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = describe_read_error(error) if isinstance(error, OSError | ValueError) else f"is damaged ({error})"
        raise DataError(f"{path}: {reason}. Start over with --overwrite.") from error


def remove_progress(path: Path) -> None:
    """Deletes the state of a run that is complete, or is started over."""
    path.unlink(missing_ok=True)
    if path.parent.exists():
        flush_folder(path.parent)
