"""Reads what plans of staged runs have in common: their head, the keys of their stages, and problems with either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.config.merge_files import flatten, gather
from megatron.config.value_types import did_you_mean
from megatron.config.yaml.problems import Given, Origin, Problem, YamlValue, problem_with, report
from megatron.config.yaml.yaml_files import LocatedValue, read_yaml
from megatron.errors import ConfigError

KINDS = ("stages", "inheritune")
"""Keys of a plan that say what it trains; it has one of them."""

SET_BY_PLAN = frozenset(
    {"train_iters", "exit_interval", "save", "load", "iteration", "finetune", "auto_resume", "log_dir",
     "pretrain_partial_init", "grow.at_step", "grow.at_tokens", "grow.qkv_slot_num", "grow.proj_slot_num",
     "grow.ffn_slot_num", "grow.num_layers", "grow.factor"}
)  # fmt: skip
"""Keys that follow from a stage's place, budget and sizes."""


@dataclass(frozen=True)
class StageEntry:
    """A stage as the plan writes it."""

    name: str
    origin: Origin
    budget: Given
    restarts: bool
    given: Mapping[str, Given]
    reference: str | None = None
    """Folder of the checkpoint whose weights the first stage takes; None for initial weights."""


@dataclass(frozen=True)
class PlanHead:
    """Head of a plan: what stands before its stages; and what it says of them, unread."""

    files: tuple[Path, ...]
    """YAML files of the first stage."""
    folder: Path
    given: Mapping[str, Given]
    """Keys of these files and of the command line."""
    command_line: Mapping[str, Given]
    """Those of the command line, which take the place of every stage's."""
    content: Mapping[str, LocatedValue]
    """The mapping under the plan's kind."""


def kind_of_plan(file: Path) -> str:
    """Returns the one of KINDS that a plan is of. Raises ConfigError for a file that cannot be read."""
    content, problems = read_yaml(file)
    if problems:
        raise ConfigError(report(problems, [file]))
    return "inheritune" if "inheritune" in content else "stages"


def read_plan(file: Path, overrides: Sequence[str], kind: str, expected: str) -> PlanHead:
    """Reads a plan of one of KINDS, whose mapping is what is `expected`; `overrides` are key=value for every stage.

    Raises ConfigError with files and lines.
    """
    content, problems = read_yaml(file)
    if problems:
        raise ConfigError(report(problems, [file]))
    problems = list(unknown_keys(content, ("config_files", "folder", kind), file, "a plan"))
    names = content["config_files"].value if "config_files" in content else None
    inner = content[kind].value if kind in content else None
    folder = content["folder"].value if "folder" in content else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        problems.append(
            problem_at(file, content, "config_files", "expected the YAML files of the first stage, as a list")
        )
    if not isinstance(inner, dict) or not inner:
        problems.append(problem_at(file, content, kind, expected))
    if not isinstance(folder, str):
        problems.append(problem_at(file, content, "folder", "expected a folder for the stages' runs"))
    if problems or not isinstance(names, list) or not isinstance(inner, dict):
        raise ConfigError(report(problems, [file]))
    base = [file.parent / str(name) for name in names]
    gathered = gather(base, overrides)
    command_line = {key: item for key, item in gathered.given.items() if item.origin.kind == "command line"}
    problems = gathered.problems + [set_by_plan(item) for key, item in command_line.items() if key in SET_BY_PLAN]
    if problems:
        raise ConfigError(report(problems, [file, *base]))
    return PlanHead(tuple(base), Path(str(folder)), gathered.given, command_line, inner)


def read_keys(
    file: Path, fields: Mapping[str, LocatedValue], key: str, prefix: str = ""
) -> tuple[dict[str, Given], list[Problem]]:
    """Reads the mapping `key` of a stage as flat YAML keys, each after `prefix`; and what is wrong with it."""
    content = fields[key].value if key in fields else {}
    if not isinstance(content, dict):
        return {}, [problem_at(file, fields, key, "expected keys of a configuration and their values")]
    if prefix:
        line = fields[key].line if key in fields else 0
        content = {prefix: LocatedValue(content, line)} if content else {}
    given, problems = dict[str, Given](), list[Problem]()
    for item in flatten(content, file):
        if isinstance(item, Problem):
            problems.append(item)
        elif item.key in SET_BY_PLAN:
            problems.append(set_by_plan(item))
        else:
            given[item.key] = item
    return given, problems


def is_count(value: YamlValue) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and float(value).is_integer()


def set_by_plan(item: Given) -> Problem:
    return problem_with(
        item, "follows from the stage's place, sizes, budget (tokens or steps) and `restart`; remove it"
    )


def unknown_keys(content: Mapping[str, LocatedValue], known: Sequence[str], file: Path, what: str) -> Iterator[Problem]:
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known) or f"; {what} has {', '.join(known)}"
            yield problem_at(file, content, key, f"no key of {what}{hint}")


def origin_of(file: Path, content: Mapping[str, LocatedValue], key: str) -> Origin:
    return Origin("file", key, file, content[key].line if key in content else 0)


def problem_at(file: Path, content: Mapping[str, LocatedValue], key: str, message: str) -> Problem:
    if key not in content:
        return Problem(f"{file}: missing key {key}", message, Origin("file", key, file))
    origin = origin_of(file, content, key)
    return Problem(f"{origin} {key}", message, origin)
