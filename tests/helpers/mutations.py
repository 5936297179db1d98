"""Damage and malice for readers of files, as hypothesis strategies: what a disk, a copy or an attacker may make of one.

The strategies only choose; `settings_of` derandomizes them, so that every run of a test sees the same files.
"""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from megatron.errors import UserError

T = TypeVar("T")

MOST_MEMORY = 1 << 30
"""Memory that reading small files may take at most [bytes]."""
RAW = "@raw@"
"""Replaced in the JSON text by what Python's own writer refuses to write."""
RAW_VALUES = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 50_000,
    "nested": "[" * 500 + "]" * 500,
    "digits": "1" * 5000,
    "not a number": "NaN",
    "infinity": "-Infinity",
    "large exponent": "1e999",
    "half a pair": r'"\ud800"',
    "control": '"\x01"',
    "nothing": "",
}
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, "", "0", "-1", "1e9", "\0",
    "../../etc/passwd", "/dev/zero", "a/b", "$x^", "\n", "💥" * 3, "x" * 10_000, [], {}, [None], [[0]], {"": None},
    {"format": 1},
)  # fmt: skip


def settings_of(examples: int) -> settings:
    """Returns the settings of a fuzzer: this many files, the same in every run, however long one takes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # files of a hundred kilobytes take long to shrink, and say little
    )


class FileContent(bytes):
    """Bytes of a file, which a failing test shows in short."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes, {self[:32].hex(' ')} ...>"


def damaged_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Files of which a byte is changed, pieces are missing, doubled, zeroed or foreign, or the end is cut off."""
    places = st.integers(0, max(len(content) - 1, 0))

    def flip(place: int, mask: int) -> bytes:
        return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]

    def replace(place: int, length: int, piece: bytes) -> bytes:
        return content[:place] + piece + content[place + length :]

    damaged = st.one_of(
        st.builds(flip, places, st.integers(1, 255)),
        st.builds(flip, st.integers(0, min(len(content), 128) - 1), st.integers(1, 255)),
        st.builds(lambda place: content[:place], places),
        st.builds(replace, places, st.integers(0, 64), st.binary(max_size=64)),
        st.builds(lambda place, length: replace(place, length, b"\0" * length), places, st.integers(1, 4096)),
        st.builds(
            lambda place, length: replace(place, 0, content[place : place + length]), places, st.integers(1, 512)
        ),
    )
    return damaged.map(FileContent)


def damaged_json(document: Any) -> st.SearchStrategy[bytes]:
    """JSON files of which one or two values are hostile, missing, or under another name."""
    return st.lists(_changes(document), min_size=1, max_size=2).map(lambda changes: _json_bytes(document, changes))


def damaged_structure(document: Any, leaves: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """Copies of nested dictionaries, lists and tuples in which one value is one of `leaves`, missing or renamed."""

    def changed(place: list[Any], action: str, leaf: int) -> Any:
        return _changed(document, place, action, leaves[leaf])

    places = sorted(_places(document), key=repr)
    actions = st.sampled_from(["replace", "replace", "replace", "delete", "rename"])
    return st.builds(changed, st.sampled_from(places), actions, st.integers(0, len(leaves) - 1))


def _changes(document: Any) -> st.SearchStrategy[tuple[list[Any], str, Any]]:
    # By their depth, or the thousands of entries of a vocabulary would leave little for all others.
    by_depth: dict[int, list[list[Any]]] = {}
    for place in _places(document):
        by_depth.setdefault(len(place), []).append(place)
    places = st.sampled_from(sorted(by_depth)).flatmap(lambda depth: st.sampled_from(by_depth[depth]))
    values = st.sampled_from([*HOSTILE_VALUES, *(RAW + name for name in RAW_VALUES)])
    return st.tuples(places, st.sampled_from(["replace", "replace", "replace", "delete", "rename"]), values)


def _json_bytes(document: Any, changes: list[tuple[list[Any], str, Any]]) -> bytes:
    for place, action, value in changes:
        document = _changed(document, place, action, value)
    text = json.dumps(document)
    for name, raw in RAW_VALUES.items():
        text = text.replace(f'"{RAW}{name}"', raw)
    return FileContent(text.encode())


def _places(document: Any) -> Iterator[list[Any]]:
    yield []
    entries: Any = document.items() if isinstance(document, dict) else ()
    if isinstance(document, list | tuple):
        entries = enumerate(document)
    for key, value in entries:
        yield from ([key, *place] for place in _places(value))


def _changed(document: Any, place: list[Any], action: str, value: Any) -> Any:
    if not place:
        return deepcopy(value) if action == "replace" else document
    first, *rest = place
    try:
        inner = document[first]
    except (LookupError, TypeError):  # an earlier change has taken this place away
        return document
    if isinstance(document, tuple):
        return tuple(_changed(list(document), place, action, value))
    changed: Any = dict(document) if isinstance(document, dict) else list(document)
    if rest or action == "replace":
        changed[first] = _changed(inner, rest, action, value)
    else:
        del changed[first]
        if action == "rename" and isinstance(changed, dict):
            changed[f"{first}_" if isinstance(first, str) else "other"] = inner
    return changed


class Findings:
    """Outcomes of a fuzzer's files, and the memory that they took."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._before = _peak_memory()

    def read(self, read: Callable[[], T], place: Path) -> T | None:
        """Returns what `read` returns, or None when it refuses: by a typed error that names the file or folder `place`.

        Any other error passes, and fails the test.
        """
        try:
            return read()
        except UserError as error:
            assert str(place) in str(error), f"the message does not name {place}: {error}"
            self.counts["refused"] += 1
            return None

    def accept(self, reason: str) -> None:
        """Counts a file that was read, for a reason that the test lists."""
        self.counts[reason] += 1

    def report(self) -> None:
        """Prints the counts. Fails where reading has taken memory for what the files only claimed."""
        print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items())))
        assert _peak_memory() - self._before < MOST_MEMORY


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
