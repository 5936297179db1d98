"""Origins of configuration values, and the report of everything that is wrong with a configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from megatron.config.redaction import redact, redact_urls

YamlValue: TypeAlias = "bool | int | float | str | list[YamlValue] | dict[str, YamlValue] | None"


@dataclass(frozen=True)
class Origin:
    """The place that a value came from; prints as `file:line`, `command line`, `default` or `derived`."""

    kind: Literal["file", "command line", "default", "derived"]
    key: str = ""
    """The flat key that set the value."""
    file: Path | None = None
    line: int = 0
    """Line in `file`, from 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.kind == "file" else self.kind


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Given:
    """One key that a file or the command line sets."""

    key: str
    """Flat, with underscores; keys of nested dictionaries are joined by dots."""
    value: YamlValue
    origin: Origin
    is_known: bool = True
    """Whether the key is in the table; the name of any other tells whether its value may be a secret."""

    @property
    def shown(self) -> str:
        """Returns the value for messages: shortened, and redacted where it may be a secret."""
        return show(redact(self.value, "" if self.is_known else self.key))

    def __str__(self) -> str:
        return f"{self.origin} {show_key(self.key)}: {self.shown}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    where: str
    """`file:line key: value`, or as much of it as there is."""
    message: str
    """What was expected, why, and what to do."""
    origin: Origin = DEFAULT

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def problem_with(given: Given, message: str) -> Problem:
    """Returns a problem with the value that a key was given."""
    return Problem(str(given), message, given.origin)


_NEEDS_QUOTES = re.compile(r"[-+.\d][\w.+-]*|[Tt]rue|[Ff]alse|[Nn]ull|None|~|")
_SHOWN_CHARACTERS = 80
_SHOWN_PROBLEMS = 100


def show(value: object) -> str:
    """Writes a value as it would stand in a YAML file, shortened when long, without the secrets of URLs."""
    if isinstance(value, str) and value.isprintable() and not _NEEDS_QUOTES.fullmatch(value):
        return _shortened([redact_urls(value)])
    return _shortened(json.JSONEncoder().iterencode(redact(value)))


def show_key(key: str) -> str:
    """Writes a key on one line, shortened when long."""
    return _shortened([key if key.isprintable() else json.dumps(key)])


def _shortened(parts: Iterable[str]) -> str:
    text = ""
    for part in parts:
        text += part
        if len(text) > _SHOWN_CHARACTERS:
            return text[: _SHOWN_CHARACTERS - 3] + "..."
    return text


def report(problems: Sequence[Problem], files: Sequence[Path]) -> str:
    """Lists all problems, in the order of the files and their lines; what no file says comes last.

    Of more than a hundred, the first hundred are listed.
    """

    def position(problem: Problem) -> tuple[int, int]:
        file = problem.origin.file
        return (files.index(file) if file in files else len(files), problem.origin.line)

    lines = [str(problem) for problem in sorted(problems, key=position)[:_SHOWN_PROBLEMS]]
    if len(problems) == 1:
        return lines[0]
    more = len(problems) - len(lines)
    return "\n".join(
        [f"{len(problems)} errors in the configuration:", *lines, *([f"... and {more} more"] if more else [])]
    )
