"""Gathers the keys that several YAML files and the command line set, flat, each with its origin.

As in NeoX, files are merged and a key may stand in one of them only. `key=value` overrides come after the files: a
dictionary is merged into that of the files, a null clears its key with all that is in it, and of a key that is given
twice the last counts, so that scripts can append to a command.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron.config.neox.keys.table import is_dictionary, is_known, neox_keys, without_extra_args
from megatron.config.yaml.problems import Given, Origin, Problem, problem_with, show, show_key
from megatron.config.yaml.yaml_files import MAX_KEY, LocatedValue, read_value, read_yaml

OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
"""Form of an override on the command line."""

FURTHER_STEPS = re.compile(r"train[-_]iters=\+(?P<steps>[1-9][0-9]{0,11})")
"""Form of an override that asks for so many steps more; YAML would read it as so many in all."""
DECAY_SHARE = "lr_decay_fraction"

COMMAND_LINE = Origin("command line")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates what a command takes in one list: (names of YAML files, `key=value` overrides)."""
    overrides = [word for word in words if OVERRIDE.fullmatch(word)]
    return [word for word in words if word not in overrides], overrides


@dataclass
class Gathered:
    """The keys that are set, and what is to be said of how they are written."""

    given: dict[str, Given] = field(default_factory=dict)
    """All keys that are set, by flat name."""
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def gather(files: Sequence[Path], overrides: Sequence[str]) -> Gathered:
    """Collects all keys that are set, and what is wrong with how they are written."""
    gathered = Gathered(problems=list(_repeated_names(files)))
    top_level: dict[str, Origin] = {}
    for file in files:
        entries, wrong = read_yaml(file)
        gathered.problems += wrong
        for key in list(entries):
            origin = Origin("file", key=key, file=file, line=entries[key].line)
            if key in top_level:
                message = f"duplicate key; also in {top_level[key]}"
                gathered.problems.append(Problem(f"{origin} {show_key(key)}", message, origin))
                del entries[key]
            else:
                top_level[key] = origin
        _add(flatten(entries, file), gathered.given, gathered.problems)
    for override in overrides:
        _override(override, gathered)
    return gathered


def _override(override: str, gathered: Gathered) -> None:
    """Lets an override take the place of what the files and earlier overrides say of its keys."""
    if further := FURTHER_STEPS.fullmatch(override):
        _train_further(override, int(further["steps"]), gathered)
        return
    for item in _parse_override(override):
        if isinstance(item, Problem):
            gathered.problems.append(item)
            continue
        earlier = gathered.given.get(item.key)
        if earlier is not None and earlier.origin == COMMAND_LINE and earlier.value != item.value:
            gathered.notices.append(f"{item}: counts as the last of the command line, in place of {earlier.shown}")
        cleared = [key for key in gathered.given if key.startswith(f"{item.key}.")] if item.value is None else []
        for key in cleared:
            del gathered.given[key]
        if item.value is None and (cleared or earlier is not None) and not item.is_known:
            gathered.given.pop(item.key, None)
        else:
            gathered.given[item.key] = item


def _train_further(override: str, steps: int, gathered: Gathered) -> None:
    """Adds steps to those that the files ask for; the schedule of the learning rate stays as long as it was."""
    asked = gathered.given.get("train_iters")
    if asked is None or type(asked.value) is not int:
        gathered.problems.append(
            Problem(f"command line {override}", "needs a train_iters in the files to add to", COMMAND_LINE)
        )
    elif gathered.given.get(DECAY_SHARE) is not None:
        message = f"{DECAY_SHARE} makes the schedule a share of train_iters; give lr_decay_iters in its place"
        gathered.problems.append(Problem(f"command line {override}", message, COMMAND_LINE))
    else:
        total = Given("train_iters", asked.value + steps, COMMAND_LINE)
        gathered.given["train_iters"] = total
        gathered.notices.append(f"{asked.origin} train_iters: {asked.value:,}, and {steps:,} more: {total.value:,}")
        decay = gathered.given.get("lr_decay_iters")
        if decay is None or decay.value is None:
            gathered.given["lr_decay_iters"] = Given("lr_decay_iters", asked.value, asked.origin)


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
        if isinstance(entry.value, dict) and is_dictionary(key):
            yield from flatten(entry.value, file, f"{key}.")
        elif is_dictionary(key) and without_extra_args(key) not in neox_keys():
            block = Given(key, entry.plain(), origin)
            if entry.value is None:
                yield block
            else:
                around = f"{without_extra_args(key)}."
                inner = sorted(known.removeprefix(around) for known in neox_keys() if known.startswith(around))
                yield problem_with(block, f"expected a mapping with some of the keys {', '.join(inner)}")
        else:
            yield Given(key, entry.plain(), origin, is_known(key))


def _parse_override(override: str) -> Iterator[Given | Problem]:
    match = OVERRIDE.fullmatch(override)
    if match is None:
        yield Problem(f"command line {show(override)}", "expected key=value", COMMAND_LINE)
        return
    key = match["key"].replace("-", "_")
    if len(key) > MAX_KEY:
        yield Problem(f"command line {show_key(key)}", f"expected a key of at most {MAX_KEY} characters", COMMAND_LINE)
        return
    entry, problems = read_value(match["value"])
    written = Given(key, match["value"], COMMAND_LINE, is_known(key))
    yield from (problem_with(written, problem.message) for problem in problems)
    if not problems:
        yield from flatten({key: entry}, None)
