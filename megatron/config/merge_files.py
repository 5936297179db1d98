"""Gathers the keys that several YAML files and the command line set, flat, each with its origin.

As in NeoX, files are merged and a key may stand in one of them only. `key=value` overrides come after the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron.config.neox.keys.table import neox_keys, nested_keys
from megatron.config.yaml.problems import Given, Origin, Problem, problem_with
from megatron.config.yaml.yaml_files import LocatedValue, read_value, read_yaml

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
"""Form of an override on the command line."""

COMMAND_LINE = Origin("command line")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates what a command takes in one list: (names of YAML files, `key=value` overrides)."""
    overrides = [word for word in words if OVERRIDE.fullmatch(word)]
    return [word for word in words if word not in overrides], overrides


def gather(files: Sequence[Path], overrides: Sequence[str]) -> tuple[dict[str, Given], list[Problem]]:
    """Returns all keys that are set, by flat name, and what is wrong with how they are written."""
    given: dict[str, Given] = {}
    problems = list(_repeated_names(files))
    top_level: dict[str, Origin] = {}
    for file in files:
        entries, wrong = read_yaml(file)
        problems += wrong
        for key in list(entries):
            origin = Origin("file", key=key, file=file, line=entries[key].line)
            if key in top_level:
                problems.append(Problem(f"{origin} {key}", f"duplicate key; also in {top_level[key]}", origin))
                del entries[key]
            else:
                top_level[key] = origin
        _add(flatten(entries, file), given, problems)
    by_command: dict[str, Given] = {}
    for override in overrides:
        _add(_parse_override(override), by_command, problems)
    return given | by_command, problems


def _add(found: Iterator[Given | Problem], given: dict[str, Given], problems: list[Problem]) -> None:
    for item in found:
        if isinstance(item, Problem):
            problems.append(item)
        elif item.key in given:
            problems.append(problem_with(item, f"duplicate key; also in {given[item.key].origin}"))
        else:
            given[item.key] = item


def _repeated_names(files: Sequence[Path]) -> Iterator[Problem]:
    """Reports files of one name: a run keeps its YAMLs in one folder beside its checkpoints."""
    for index, file in enumerate(files):
        for earlier in files[:index]:
            if earlier.name == file.name:
                yield Problem(str(file), f"another file of this name is given: {earlier}", Origin("file", file=file))


def flatten(entries: Mapping[str, LocatedValue], file: Path | None, prefix: str = "") -> Iterator[Given | Problem]:
    """Yields the flat keys that `entries` set in `file`, or on the command line, and what is wrong with them."""
    for name, entry in entries.items():
        key = prefix + name
        origin = COMMAND_LINE if file is None else Origin("file", key=key, file=file, line=entry.line)
        if isinstance(entry.value, dict) and key in nested_keys():
            yield from flatten(entry.value, file, f"{key}.")
        elif key in nested_keys() and key not in neox_keys():
            if entry.value is not None:
                inner = sorted(known.removeprefix(f"{key}.") for known in neox_keys() if known.startswith(f"{key}."))
                shown = Given(key, entry.plain(), origin)
                yield problem_with(shown, f"expected a mapping with some of the keys {', '.join(inner)}")
        else:
            yield Given(key, entry.plain(), origin)


def _parse_override(override: str) -> Iterator[Given | Problem]:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        yield Problem(f"command line {override}", "expected key=value", COMMAND_LINE)
        return
    key = match["key"].replace("-", "_")
    entry, problems = read_value(match["value"])
    yield from (Problem(f"command line {override}", problem.message, COMMAND_LINE) for problem in problems)
    yield from flatten({key: entry}, None)
