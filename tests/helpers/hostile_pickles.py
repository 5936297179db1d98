"""Files of torch.save that no training wrote: bombs, endless structures, archives that claim what they do not hold."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.bombs import Bomb
from tests.helpers.mutations import FileContent, damaged_bytes

NAMES = ("../../x", "/etc/x", "a/../data.pkl", "", "x" * 300, "archive/data/999", "archive/data.pkl", "constants.pkl")
CENTRAL_ENTRY = b"PK\x01\x02"
SIZES_AND_OFFSET = (20, 24, 42)
"""Places in a central entry of the packed and unpacked size and of the entry's offset, uint32 each."""


def _call(function: str, argument: bytes) -> bytes:
    return b"\x80\x02c" + function.replace(".", "\n", 1).encode() + b"\n" + argument + b"\x85R."


def _number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little")


def _storage(length: bytes) -> bytes:
    kind = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    return b"\x80\x02(" + kind + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + length + b"tQ."


PICKLES: dict[str, bytes] = {
    "eval": _call("builtins.eval", b"X\x08\x00\x00\x00exit(42)"),
    "system": _call("os.system", b"X\x04\x00\x00\x00true"),
    "a module of ours": _call("tests.helpers.bombs.Bomb", b"X\x01\x00\x00\x00x"),
    "huge bytes": _call("builtins.bytearray", _number(10**18)),
    "huge memo": b"\x80\x02]r\xff\xff\xff\xff.",
    "deep lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "storage by number": b"\x80\x02K\x01Q.",
    "storage of a word": _storage(b"X\x01\x00\x00\x00a"),
    "huge storage": _storage(_number(10**15)),
    "nothing": b"",
    "stop": b".",
    "no protocol 2": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
}


def _unchecked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """What an entry holds, whatever its checksum: checkpoints have SHA-256 in their manifest instead."""
    with archive.open(entry) as file:
        file.__dict__["_expected_crc"] = None
        return file.read()


def hostile_archives(content: bytes, trace: Path) -> st.SearchStrategy[bytes]:
    """Versions of a file of torch.save that a writer of bad intent may make; `trace` appears if one of them runs."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: _unchecked(archive, entry) for entry in archive.infolist()}
    pickle_name = next(name for name in entries if name.endswith("data.pkl"))
    names = st.sampled_from(sorted(entries))
    central = [place for place in range(len(content)) if content.startswith(CENTRAL_ENTRY, place)]

    def claim(place: int, field: int, value: int) -> bytes:
        start = place + field
        return content[:start] + struct.pack("<I", value) + content[start + 4 :]

    bombs = [Bomb(trace), {"a": Bomb(trace)}, [torch.zeros(2), Bomb(trace)]]
    hostile = st.one_of(
        st.builds(lambda old, new: _archive({new if old == name else name: data for name, data in entries.items()}),
                  names, st.sampled_from(NAMES)),
        st.builds(lambda name: _archive({other: data for other, data in entries.items() if other != name}), names),
        st.builds(lambda a, b: _archive(entries | {a: entries[b], b: entries[a]}), names, names),
        st.just(_archive(entries, zipfile.ZIP_DEFLATED)),
        st.builds(lambda size: _archive(entries | {pickle_name: bytes(size)}, zipfile.ZIP_DEFLATED),
                  st.integers(0, 1 << 24)),
        st.builds(claim, st.sampled_from(central), st.sampled_from(SIZES_AND_OFFSET),
                  st.sampled_from([0, 1, 2**31, 2**32 - 2, 2**32 - 1])),
        st.builds(lambda pickle: _archive(entries | {pickle_name: pickle}), st.sampled_from(sorted(PICKLES.values()))),
        damaged_bytes(entries[pickle_name]).map(lambda pickle: _archive(entries | {pickle_name: pickle})),
        st.builds(saved, st.sampled_from(bombs), st.booleans()),
    )  # fmt: skip
    return hostile.map(FileContent)


def saved(content: Any, archive: bool = True) -> bytes:
    """Returns the bytes that torch.save writes, in its present format or in that before 1.6."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def _archive(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name) if compression == zipfile.ZIP_STORED else name, data)
    return file.getvalue()
