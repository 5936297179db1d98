"""Origins of configuration values, and the report of everything that is wrong with a configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

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

    def __str__(self) -> str:
        return f"{self.origin} {self.key}: {show(self.value)}"


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


def show(value: YamlValue) -> str:
    """Writes a value as it would stand in a YAML file, shortened when long."""
    plain = isinstance(value, str) and value.isprintable() and not _NEEDS_QUOTES.fullmatch(value)
    text = value if isinstance(value, str) and plain else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def report(problems: Sequence[Problem], files: Sequence[Path]) -> str:
    """Lists all problems, in the order of the files and their lines; what no file says comes last."""

    def position(problem: Problem) -> tuple[int, int]:
        file = problem.origin.file
        return (files.index(file) if file in files else len(files), problem.origin.line)

    lines = [str(problem) for problem in sorted(problems, key=position)]
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} errors in the configuration:", *lines])
