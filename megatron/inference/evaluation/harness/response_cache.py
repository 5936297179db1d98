"""Responses that were computed before, in a file of JSON lines, so that an interrupted evaluation goes on.

A line is {"key": SHA-256 of the request, "answer": the response}. A line that was cut off is dropped, and its request
computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron.errors import DataError
from megatron.io.json_files import parse_json

T = TypeVar("T")


class ResponseCache:
    """Responses by request, in memory and in a file; `path` None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        """Reads what the file holds. Raises DataError when it cannot be used."""
        self.path = path
        self.responses: dict[str, Any] = {}
        if path is not None:
            self._read(path)

    def complete(
        self, kind: str, requests: Sequence[T], compute: Callable[[list[T]], Iterable[tuple[int, Any]]]
    ) -> list[Any]:
        """Returns the response to each request, and computes the missing ones.

        `compute` is given the requests without a response, and yields (position among them, response). What it has
        yielded is kept, whatever happens next.
        """
        keys = [_key(kind, request) for request in requests]
        if self.path is None:
            fresh = dict(compute(list(requests)))
            return [fresh[index] for index in range(len(requests))]
        missing = [index for index, key in enumerate(keys) if key not in self.responses]
        if missing:
            with self.path.open("a", encoding="utf-8") as file:
                for place, response in compute([requests[index] for index in missing]):
                    key = keys[missing[place]]
                    self.responses[key] = response
                    file.write(json.dumps({"key": key, "answer": response}) + "\n")
        return [self.responses[key] for key in keys]

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):
                text = text[: text.rfind("\n") + 1]
                path.write_text(text, encoding="utf-8")
            for line in text.splitlines():
                entry = parse_json(line)
                self.responses[entry["key"]] = entry["answer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"eval_cache: {path} cannot be used ({error}). Delete it, or name another folder."
            ) from error


def _key(kind: str, request: Any) -> str:
    return hashlib.sha256(json.dumps([kind, request], sort_keys=True).encode()).hexdigest()
