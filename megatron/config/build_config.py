"""Builds the typed configuration from settings, and reports by key and line what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, cast

from pydantic import ValidationError

from megatron.config.architecture import architecture_facts, optional_sections
from megatron.config.checks import (
    checkpoint,
    commands,
    data,
    elastic,
    files,
    grow,
    inherit,
    layout,
    model,
    speedups,
    training,
)
from megatron.config.checks.finding import Finding
from megatron.config.neox.translate import Setting
from megatron.config.optimizer import DEFAULT_OPTIMIZER, OPTIMIZERS, optimizer_facts
from megatron.config.sections.run_config import OPTIONAL_SECTIONS, RunConfig
from megatron.config.sections.section_fields import Field, fields
from megatron.config.value_types import describe, expected
from megatron.config.yaml.problems import DEFAULT, Origin, Problem, problem_with, report, show
from megatron.errors import ConfigError

_ALWAYS = (layout, model, files, training, data, speedups, checkpoint, commands)
_OF_OPTIONAL_SECTIONS = (grow, inherit, elastic)
CHECKS = tuple(check for room in _ALWAYS for check in room.CHECKS)
ALL_CHECKS = (*CHECKS, *(check for room in _OF_OPTIONAL_SECTIONS for check in room.CHECKS))
_SECTIONS_WITH_REQUIRED_KEYS = ("model", "training", "training.optimizer")


def build(settings: Mapping[str, Setting], refused: Set[str]) -> tuple[RunConfig | None, list[Problem]]:
    """Builds the configuration, or returns None and all that is wrong with it: types first, then contradictions.

    Problems with paths in `refused` are reported already.
    """
    try:
        run = RunConfig.model_validate(_nest(settings))
    except ValidationError as error:
        found = {_path_of(details["loc"]): None for details in error.errors() if _is_about_a_value(details["type"])}
        problems = [_type_problem(path, settings) for path in found if path not in refused]
        return None, problems + _checked_in_part(settings, refused | found.keys())
    if refused:
        return None, _checked_in_part(settings, refused)
    findings = [finding for check in ALL_CHECKS for finding in check(run)]
    return (None if findings else run), [_located(finding, settings) for finding in findings]


def require_consistent(run: RunConfig, made_from: RunConfig) -> None:
    """Checks a configuration that was made from another one rather than from YAML.

    Raises ConfigError with everything that does not fit together, and did before.
    """
    known = {finding for check in CHECKS for finding in check(made_from)}
    problems = [
        Problem(f"{fields()[finding.path].key}: {show(attrgetter(finding.path)(run))}", finding.message)
        for check in CHECKS
        for finding in check(run)
        if finding not in known
    ]
    if problems:
        raise ConfigError(report(problems, ()))


def origins(run: RunConfig, settings: Mapping[str, Setting]) -> dict[str, Origin]:
    """Returns the origin of every value of the configuration, by dotted path."""
    found: dict[str, Origin] = {}
    for path, field in fields(type(run.training.optimizer)).items():
        if _is_absent(path, run):
            continue
        found[path] = settings[path].origin if path in settings else Origin("derived") if field.derived else DEFAULT
    return found


def _is_absent(path: str, run: RunConfig) -> bool:
    """Tells whether a value lies in an optional section that the run or its architecture does not have."""
    section, _, name = path.partition(".")
    if section in OPTIONAL_SECTIONS:
        return getattr(run, section) is None
    section, _, name = path.removeprefix("model.").partition(".")
    return bool(name) and section in optional_sections() and getattr(run.model, section) is None


def _nest(settings: Mapping[str, Setting]) -> dict[str, Any]:
    sections = [*_SECTIONS_WITH_REQUIRED_KEYS, *(f"model.{section}" for section in _own_sections(settings))]
    nested: dict[str, Any] = {}
    for section in sections:
        _section_at(nested, section.split("."))
    for path, setting in settings.items():
        *section_parts, name = path.split(".")
        _section_at(nested, section_parts)[name] = setting.value
    return nested


def _section_at(nested: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    for part in parts:
        nested = nested.setdefault(part, {})
    return nested


def _own_sections(settings: Mapping[str, Setting]) -> Set[str]:
    """Returns the optional sections of the model that its architecture has."""
    architecture = settings.get("model.architecture")
    facts = None if architecture is None else architecture_facts(architecture.value)
    return set() if facts is None else facts.sections.keys()


def _fields(settings: Mapping[str, Setting]) -> dict[str, Field]:
    """Returns the values of the configuration with the chosen optimizer; with the default one where it is unknown."""
    chosen = settings.get("training.optimizer.type")
    facts = None if chosen is None else optimizer_facts(chosen.value)
    return fields((facts or OPTIMIZERS[DEFAULT_OPTIMIZER]).section)


def _is_about_a_value(error_type: str) -> bool:
    """Tells whether an error is about a value of its own: pydantic also reports defaults that depend on a wrong one."""
    return error_type != "default_factory_not_called"


def _path_of(location: tuple[int | str, ...]) -> str:
    """Returns the field that a pydantic error is about: its location, without list positions and union branches."""
    parts = [str(part) for part in location]
    while parts and ".".join(parts) not in fields():
        parts.pop()
    return ".".join(parts)


def _type_problem(path: str, settings: Mapping[str, Setting]) -> Problem:
    setting = settings.get(path)
    field = _fields(settings)[path]
    if setting is not None and setting.given is not None:
        return problem_with(setting.given, expected(setting.given.value, field.schema))
    advice = f"; {field.difference}" if field.difference.startswith("must be") else ""
    return Problem(f"missing key {field.key}", f"expected {describe(field.schema)}{advice}")


def _checked_in_part(settings: Mapping[str, Setting], wrong: Set[str]) -> list[Problem]:
    """Runs the checks on the values that are right; a check that needs a wrong one is left out."""
    known = cast(RunConfig, _partial(settings, wrong))
    findings: list[Finding] = []
    for check in ALL_CHECKS:
        try:
            findings += check(known)
        except AttributeError:
            continue
    return [_located(finding, settings) for finding in findings]


def _partial(settings: Mapping[str, Setting], wrong: Set[str]) -> SimpleNamespace:
    root = SimpleNamespace()
    for path, field in _fields(settings).items():
        if path in wrong or (path not in settings and (field.required or field.derived)):
            continue
        *section_parts, name = path.split(".")
        section = root
        for part in section_parts:
            if not hasattr(section, part):
                setattr(section, part, SimpleNamespace())
            section = getattr(section, part)
        setattr(section, name, settings[path].value if path in settings else field.default)
    for absent in optional_sections().keys() - _own_sections(settings):
        setattr(root.model, absent, None)
    for name in OPTIONAL_SECTIONS:
        if not any(path.startswith(f"{name}.") for path in settings):
            setattr(root, name, None)
    return root


def _located(finding: Finding, settings: Mapping[str, Setting]) -> Problem:
    setting = settings.get(finding.path)
    message = finding.message + _other_names(finding, settings)
    if setting is not None and setting.given is not None:
        return problem_with(setting.given, message)
    field = _fields(settings)[finding.path]
    shown = "" if field.default is None else f": {show(field.default)} (default)"
    section = finding.path.partition(".")[0]
    given = (path for path in settings if section in OPTIONAL_SECTIONS and path.startswith(f"{section}."))
    beside = next(given, None)
    if beside is None:
        return Problem(field.key + shown, message)
    # The section is there because another of its keys was given.
    origin = settings[beside].origin
    return Problem(f"{origin} {field.key}{shown}", message, origin)


def _other_names(finding: Finding, settings: Mapping[str, Setting]) -> str:
    """Says which key the user wrote, such as `batch_size`, for each that a message calls by its first name."""
    said = set(re.findall(r"[a-z][a-z0-9_.]*[a-z0-9]", finding.message))
    names = []
    for path, field in _fields(settings).items():
        given = settings[path].given if path in settings and path != finding.path else None
        if given is not None and given.key != field.key and field.key in said:
            names.append(f"{given.key} sets {field.key}")
    return f" ({', '.join(names)})" if names else ""
