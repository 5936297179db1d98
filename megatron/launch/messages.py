"""Lines in which a process that watches ranks tells the one that has started it what happens to them.

They travel in the standard error of ssh, pdsh, srun or mpirun, among whatever else is written there, behind the record
separator of RFC 7464. Those programs pass lines on whole up to about a thousand bytes, so that a message is cut into
several.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

MESSAGES_VARIABLE = "LAUNCHER_MESSAGES"
"""Tells a process that its launcher reads such lines, so that it prints no failure itself."""

SEPARATOR = b"\x1e"
_PIECE_CHARACTERS = 600


def send(kind: str, content: Mapping[str, Any]) -> None:
    """Writes a message to standard error."""
    text = json.dumps({"kind": kind, **content})
    pieces = [text[start : start + _PIECE_CHARACTERS] for start in range(0, len(text), _PIECE_CHARACTERS)]
    name = secrets.token_hex(4)
    sys.stderr.flush()
    for number, piece in enumerate(pieces):
        line = json.dumps([name, number, len(pieces), piece]).encode()
        os.write(sys.stderr.fileno(), SEPARATOR + line + b"\n")


class MessageReader:
    """Takes the messages out of a stream of bytes, and passes everything else on as it comes."""

    def __init__(self, output: BinaryIO, receive: Callable[[str, dict[str, Any]], None]) -> None:
        """Sends the rest to `output`; calls `receive` with each message's kind and content."""
        self._output = output
        self._receive = receive
        self._rest = b""
        self._pieces: dict[str, dict[int, str]] = {}

    def feed(self, chunk: bytes) -> None:
        """Reads on."""
        self._rest += chunk
        while SEPARATOR in self._rest:
            before, _, after = self._rest.partition(SEPARATOR)
            self._pass_on(before)
            line, end, self._rest = after.partition(b"\n")
            if not end:
                self._rest = SEPARATOR + line
                return
            self._take(line)
        self._pass_on(self._rest)
        self._rest = b""

    def close(self) -> None:
        """Passes on what an end in the middle of a line has left."""
        self._pass_on(self._rest)
        self._rest = b""

    def _pass_on(self, text: bytes) -> None:
        if text:
            self._output.write(text)
            self._output.flush()

    def _take(self, line: bytes) -> None:
        try:
            name, number, count, piece = json.loads(line)
        except ValueError:  # somebody else's separator
            self._pass_on(line + b"\n")
            return
        pieces = self._pieces.setdefault(name, {})
        pieces[number] = piece
        if len(pieces) == count:
            message = json.loads("".join(pieces[place] for place in range(count)))
            del self._pieces[name]
            self._receive(message.pop("kind"), message)
