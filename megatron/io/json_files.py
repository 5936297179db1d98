"""Reads JSON that anybody may have written or damaged: whatever it holds, the errors are OSError and ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28
"""Largest JSON file that is read. The largest tokenizer.json that is published has 33 MB [bytes]."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a UTF-8 file of JSON of at most `max_bytes` [bytes].

    Raises OSError when it cannot be read, ValueError, with the reason alone, when it is larger or `parse_json` raises.
    """
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"is larger than {max_bytes:,} bytes")
    return parse_json(content)


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON object. Raises what `read_json` does, and ValueError for JSON that is no object."""
    content = read_json(path, max_bytes)
    if not isinstance(content, dict):
        raise ValueError(f"holds a JSON {type(content).__name__}, not an object")
    return content


def sound_lines(path: Path, accepts: Callable[[object], bool], expected: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads what can be read of a file of JSON objects, one on each line, and a sentence for each damaged line.

    An object that `accepts` refuses is damaged too, for there is `expected`. Raises OSError when it cannot be read.
    """
    sound: list[dict[str, Any]] = []
    damaged: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_json(line)
        except ValueError as error:
            damaged.append(f"{path}:{number}: left out, {error}")
            continue
        if isinstance(value, dict) and accepts(value):
            sound.append(value)
        else:
            damaged.append(f"{path}:{number}: left out, {expected}")
    return sound, damaged


def describe_read_error(error: OSError | ValueError) -> str:
    """Describes why a file could not be read, in a few words that follow its name."""
    return f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)


def parse_json(content: str | bytes) -> Any:
    """Parses JSON; bytes are UTF-8. Raises ValueError, with the reason, when it is none."""
    try:
        return json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("nests JSON too deeply") from error
