"""Answers that were computed before, in a file of JSON lines, so that an evaluation that was ended goes on.

A line is {"key": SHA-256 of what was asked, "answer": ...}. A line that was cut off is left out, and asked again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron.errors import DataError

Q = TypeVar("Q")


class AnswerCache:
    """Answers by question, in memory and in a file; `path` None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        if path is not None:
            self._read(path)

    def complete(
        self, kind: str, questions: Sequence[Q], compute: Callable[[list[Q]], Iterable[tuple[int, Any]]]
    ) -> list[Any]:
        """The answer to each question; `compute` is given those without one, and yields (position among them, answer).

        What it has yielded is kept, whatever happens next.
        """
        keys = [_key(kind, question) for question in questions]
        if self.path is None:
            fresh = dict(compute(list(questions)))
            return [fresh[index] for index in range(len(questions))]
        missing = [index for index, key in enumerate(keys) if key not in self.answers]
        if missing:
            with self.path.open("a", encoding="utf-8") as file:
                for place, answer in compute([questions[index] for index in missing]):
                    key = keys[missing[place]]
                    self.answers[key] = answer
                    file.write(json.dumps({"key": key, "answer": answer}) + "\n")
        return [self.answers[key] for key in keys]

    def _read(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):
                text = text[: text.rfind("\n") + 1]
                path.write_text(text, encoding="utf-8")
            for line in text.splitlines():
                entry = json.loads(line)
                self.answers[entry["key"]] = entry["answer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"eval_cache: {path} cannot be used ({error}). Delete it, or name another folder."
            ) from error


def _key(kind: str, question: Any) -> str:
    return hashlib.sha256(json.dumps([kind, question], sort_keys=True).encode()).hexdigest()
