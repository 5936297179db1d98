"""Matrices of experiments: cells as a YAML lists them before the first one runs.

    folder: runs/experiments/growth          # for data, runs and logs
    results: results/growth/cells.csv        # counts from the matrix, as config_files do
    config_files: [growth_base.yml]
    prepare:                                 # once, unless what it creates is there
      - {creates: "{work}/data/data.json", command: [tools/datasets/prepare_data.py, --output-dir, "{work}/data"]}
    tables:
      arms: {zero_key: {kind: tokens}, stack: {kind: layers}}
    groups:
      small:
        name: small-lr{lr}-s{seed}
        vary: {lr: [1e-3, 3e-3], seed: [1, 2, 3]}          # every combination is a cell
        keys: {seed: "{seed}", optimizer: {params: {lr: "{lr}"}}}
        commands: [[deepy.py, train.py, "{config}"]]
      grown:
        name: "{arm}-s{seed}"
        vary: {arm: [zero_key, stack], seed: [1, 2, 3]}
        choose: {lr: {group: small, only: {seed: [1]}}}    # the value with the lowest mean loss, once those have run
        lookup: {arms: "{arm}"}                            # variables of a table's entry
        needs: {trunk: {groups: [small], same: {lr: lr, seed: seed}}}    # "{trunk}" is the folder of that cell's run
        keys: {load: "{trunk}", seed: "{seed}"}
        commands: [[deepy.py, train.py, "{config}"]]

A text that is one variable alone, such as "{seed}", stands for its value; in other texts variables are written out.
Further variables are {work}, {folder} of the cell's run, and {config}, the YAML file with its keys.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron.config.merge_files import gather
from megatron.config.yaml.problems import report
from megatron.config.yaml.yaml_files import read_yaml
from megatron.errors import ConfigError

ONE_VARIABLE = re.compile(r"\{(\w+)\}")
Variables = Mapping[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Strict):
    """A variable whose value is that of the best cells of another group."""

    group: str
    of: str | None = None
    """The variable's name there, where it is another."""
    like: list[str] = []
    """Variables in which those cells must agree with this one."""
    only: dict[str, list[Any]] = {}
    """Values of their variables that count, such as one seed's; none means all."""
    place: int | str = 1
    """Place in the ranking, from 1."""
    best: str | None = None
    """Another variable, of which each value's best counts, not the mean over all of it."""


class Need(_Strict):
    """The one cell of some groups whose run a cell starts from."""

    groups: list[str]
    same: dict[str, str]
    """Its variables, and those of this cell that they must equal."""


class Preparation(_Strict):
    """A command that makes what all cells need."""

    creates: str
    command: list[str]


class Group(_Strict):
    """Cells of one kind."""

    name: str
    vary: dict[str, list[Any]]
    choose: dict[str, Choice] = {}
    lookup: dict[str, str] = {}
    needs: dict[str, Need] = {}
    """By the variable that holds the folder of that cell's run."""
    keys: dict[str, Any] | str = {}
    add: dict[str, Any] = {}
    """Further keys, in place of those above."""
    commands: list[list[str]]
    measure: dict[str, str] = {"valid_loss": "valid/lm_loss"}
    """Columns of the results, and the metrics of which they hold the last value; or `FILE.json:key` of a file that a
    command has written in the cell's folder."""
    report: str | None = None
    """The cell's word for tools/growth_report.py."""


class Matrix(_Strict):
    """An experiment."""

    folder: str
    results: str
    config_files: list[str]
    prepare: list[Preparation] = []
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    groups: dict[str, Group]


@dataclass(frozen=True)
class Cell:
    """One combination of a group's values; what is chosen from others' results comes later."""

    group: str
    values: tuple[tuple[str, Any], ...]
    """By variable."""

    @property
    def variables(self) -> dict[str, Any]:
        """Returns its variables, those within records among them."""
        records = [value for _, value in self.values if isinstance(value, Mapping)]
        plain = {name: value for name, value in self.values if not isinstance(value, Mapping)}
        return {name: value for record in records for name, value in record.items()} | plain

    def agrees(self, variables: Variables, names: Sequence[str]) -> bool:
        """Tells whether it has the values that `variables` have, as far as it varies them."""
        own = self.variables
        return all(own[name] == variables[name] for name in names if name in own)


@dataclass(frozen=True)
class ReadyCell:
    """A cell of which everything is known."""

    cell: Cell
    name: str
    variables: Variables
    folder: Path
    config: Path
    keys: Mapping[str, Any]
    """The trainer's keys, flat."""
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    """Names of the cells whose runs it starts from."""
    hash: str
    """Of everything that decides its result, but for the code."""
    report: str | None


@dataclass(frozen=True)
class Result:
    """Measurements of a cell that is done."""

    name: str
    hash: str
    cell: Cell
    variables: Variables
    measured: Mapping[str, float]


def load_matrix(file: Path) -> Matrix:
    """Reads a matrix. Raises ConfigError, with the file's line where there is one."""
    content, problems = read_yaml(file)
    if problems:
        raise ConfigError(report(problems, [file]))
    try:
        return Matrix.model_validate({key: value.plain() for key, value in content.items()})
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_url=False)]
        raise ConfigError(f"{file}: {'; '.join(reasons)}") from error


class Experiment:
    """A matrix with its folders: lists its cells, and works out what each of them runs."""

    def __init__(self, file: Path, folder: Path | None = None) -> None:
        self.file = file
        self.matrix = load_matrix(file)
        self.work = (folder or Path(self.matrix.folder)).resolve()
        self.results = file.parent / self.matrix.results
        files = [file.parent / name for name in self.matrix.config_files]
        gathered = gather(files, [])
        if gathered.problems:
            raise ConfigError(report(gathered.problems, files))
        self.base = {key: item.value for key, item in gathered.given.items()}
        self.cells = [cell for name, group in self.matrix.groups.items() for cell in _combinations(name, group)]
        self._require_known_groups()

    def preparations(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        """Yields what is made before the first cell: its path, and the command that makes it."""
        variables = {"work": str(self.work)}
        for step in self.matrix.prepare:
            words = tuple(str(filled(word, variables)) for word in step.command)
            yield Path(str(filled(step.creates, variables))), words

    def ready(self, cell: Cell, results: Sequence[Result]) -> ReadyCell | None:
        """Returns the cell with all that it chooses from `results`; None while those are missing."""
        group = self.matrix.groups[cell.group]
        variables: dict[str, Any] = {"work": str(self.work)} | cell.variables
        for name, choice in group.choose.items():
            chosen = self._choose(name, choice, variables, results)
            if chosen is None:
                return None
            variables[name] = chosen
        for table, entry in group.lookup.items():
            variables |= self._entry(table, str(filled(entry, variables)))
        needed = []
        for name, need in group.needs.items():
            found = self._needed(need, variables, results)
            if found is None:
                return None
            needed.append(found)
            variables[name] = str(found.folder)
        return self._resolved(cell, group, variables, needed)

    def _resolved(self, cell: Cell, group: Group, variables: dict[str, Any], needed: Sequence[ReadyCell]) -> ReadyCell:
        name = str(filled(group.name, variables))
        folder, config = self.work / "cells" / name, self.work / "cells" / f"{name}.yml"
        variables |= {"folder": str(folder), "config": str(config)}
        own = [dict(_flat(filled(keys, variables))) for keys in (group.keys, group.add)]
        keys = self.base | own[0] | own[1] | {"save": str(folder)}
        keys = {key: filled(value, variables) for key, value in keys.items()}
        commands = tuple(tuple(str(filled(word, variables)) for word in words) for words in group.commands)
        decisive = [keys, commands, [list(words) for _, words in self.preparations()], [need.hash for need in needed]]
        text = json.dumps(decisive, sort_keys=True).replace(str(self.work), "{work}")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        word = None if group.report is None else str(filled(group.report, variables))
        names = tuple(need.name for need in needed)
        return ReadyCell(cell, name, variables, folder, config, keys, commands, names, digest, word)

    def _needed(self, need: Need, variables: Variables, results: Sequence[Result]) -> ReadyCell | None:
        wanted = {theirs: variables[ours] for theirs, ours in need.same.items()}
        cells = [cell for cell in self.cells if cell.group in need.groups and cell.agrees(wanted, list(wanted))]
        if len(cells) != 1:
            raise ConfigError(f"{self.file}: {len(cells)} cells of {', '.join(need.groups)} have {wanted}, not one.")
        ready = self.ready(cells[0], results)
        done = ready is not None and any((each.name, each.hash) == (ready.name, ready.hash) for each in results)
        return ready if done else None

    def _choose(self, name: str, choice: Choice, variables: Variables, results: Sequence[Result]) -> Any:
        """Returns the value of `name` with the lowest mean of the first measurement; None while cells are missing."""
        cells = [
            cell
            for cell in self.cells
            if cell.group == choice.group
            and cell.agrees(variables, choice.like)
            and all(cell.variables.get(name) in allowed for name, allowed in choice.only.items())
        ]
        losses: dict[Any, dict[Any, list[float]]] = {}
        column = next(iter(self.matrix.groups[choice.group].measure))
        for cell in cells:
            ready = self.ready(cell, results)
            found = [each for each in results if ready and (each.name, each.hash) == (ready.name, ready.hash)]
            if ready is None or not found:
                return None
            kind = None if choice.best is None else ready.variables[choice.best]
            losses.setdefault(ready.variables[choice.of or name], {}).setdefault(kind, []).append(
                found[0].measured[column]
            )
        means = {value: min(mean(kind) for kind in kinds.values()) for value, kinds in losses.items()}
        ranked = sorted(means, key=lambda value: means[value])
        place = int(filled(choice.place, variables))
        if not 1 <= place <= len(ranked):
            raise ConfigError(f"{self.file}: {name} has {len(ranked)} values in {choice.group}, and no place {place}.")
        return ranked[place - 1]

    def _entry(self, table: str, entry: str) -> Variables:
        found = self.matrix.tables.get(table, {})
        if entry not in found:
            raise ConfigError(f"{self.file}: the table {table} has no {entry}, but {', '.join(found) or 'nothing'}.")
        return found[entry]

    def _require_known_groups(self) -> None:
        for name, group in self.matrix.groups.items():
            needed = {other for need in group.needs.values() for other in need.groups}
            for other in needed | {choice.group for choice in group.choose.values()}:
                if other not in self.matrix.groups:
                    raise ConfigError(f"{self.file}: {name} refers to the group {other}, which there is not.")


def _combinations(name: str, group: Group) -> Iterator[Cell]:
    for values in itertools.product(*group.vary.values()):
        yield Cell(name, tuple(zip(group.vary, map(_frozen, values), strict=True)))


def _frozen(value: Any) -> Any:
    return FrozenRecord(value) if isinstance(value, dict) else value


class FrozenRecord(dict[str, Any]):
    """A record among a variable's values, which can be a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def filled(value: Any, variables: Variables) -> Any:
    """Returns a value with variables put in, in texts, lists and mappings. Raises ConfigError for an unknown one."""
    if isinstance(value, dict):
        return {key: filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, variables) for item in value]
    if not isinstance(value, str):
        return value
    try:
        match = ONE_VARIABLE.fullmatch(value)
        return filled(variables[match[1]], variables) if match else value.format_map(variables)
    except KeyError as error:
        raise ConfigError(f"{value}: no variable {error}; there are {', '.join(variables)}.") from error
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{value}: {error}. Braces stand around the name of a variable alone.") from error


def _flat(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
