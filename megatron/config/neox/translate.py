"""Turns flat NeoX keys into settings: values at dotted paths of the sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.config.architecture import architecture_facts, implied_architecture, optional_sections, owners_of
from megatron.config.neox.keys.table import (
    OPTIMIZER_PARAMS,
    find_entry,
    mapped_keys,
    neox_keys,
    without_extra_args,
)
from megatron.config.neox_entries import UNSET, Converted, Flat, Inert, MapsTo, RefusedError, Rejected
from megatron.config.optimizer import DEFAULT_OPTIMIZER, OPTIMIZERS, OptimizerFacts, optimizer_facts
from megatron.config.redaction import holds_secret_url
from megatron.config.sections.section_fields import Field, fields
from megatron.config.value_types import did_you_mean, expected, mistyped, schema_of
from megatron.config.yaml.problems import Given, Origin, Problem, YamlValue, problem_with, show


@dataclass(frozen=True)
class Setting:
    """A value for one path, and the key that set it; None where it was derived without a key."""

    value: YamlValue
    given: Given | None = None

    @property
    def origin(self) -> Origin:
        """Returns where the value came from."""
        if self.given is None:
            return Origin("derived")
        return Origin(self.given.origin.kind, self.given.key, self.given.origin.file, self.given.origin.line)


@dataclass
class Translation:
    """The result of translating the given keys."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Paths whose key was given a value that it may not have."""
    inert: list[str] = field(default_factory=list)
    """Keys without effect, and why."""
    warnings: list[str] = field(default_factory=list)
    """Those of them that the user might count on, and values that are read as others."""
    ignored: list[str] = field(default_factory=list)
    """The names of all others of them that ask for something."""


def translate(given: Mapping[str, Given]) -> Translation:
    """Looks every key up in the table. A null leaves a key of the table unset, as if it were not there."""
    translation = Translation()
    flat = {without_extra_args(key): item.value for key, item in given.items() if item.value is not None}
    optimizer = _chosen_optimizer(given, flat)
    for item in given.values():
        if item.value is not None or not item.is_known:
            _translate_key(item, flat, optimizer, translation)
    _contradicted_switches(given, translation)
    _complete(translation, flat)
    return translation


_OPTIMIZER_TYPE = "training.optimizer.type"


def _chosen_optimizer(given: Mapping[str, Given], flat: Flat) -> OptimizerFacts[Any] | None:
    """Returns the optimizer that the keys of its type name; None where they name none that is known."""
    choice = Translation()
    for item in given.values():
        entry = find_entry(item.key)
        if item.value is not None and isinstance(entry, MapsTo) and entry.path == _OPTIMIZER_TYPE:
            _set(item, entry, flat, None, choice)
    setting = choice.settings.get(_OPTIMIZER_TYPE)
    if setting is None:
        return None if choice.refused else OPTIMIZERS[DEFAULT_OPTIMIZER]
    return optimizer_facts(setting.value)


def _translate_key(item: Given, flat: Flat, optimizer: OptimizerFacts[Any] | None, translation: Translation) -> None:
    entry = find_entry(item.key, optimizer)
    match entry:
        case None:
            nearest = len(translation.problems) < _SUGGESTIONS
            translation.problems.append(problem_with(item, _unknown(item.key, optimizer) if nearest else "unknown key"))
        case Rejected():
            if not entry.allows(item.value):
                translation.problems.append(problem_with(item, entry.message()))
        case Inert():
            _note_inert(item, entry, flat, translation)
        case MapsTo():
            _set(item, entry, flat, optimizer, translation)


_SUGGESTIONS = 50
"""Problems after which no more suggestions are looked for: the file is another one than was meant."""


def _unknown(key: str, optimizer: OptimizerFacts[Any] | None) -> str:
    if optimizer is not None and key.startswith(OPTIMIZER_PARAMS):
        entries = neox_keys(optimizer).items()
        known = [own for own, entry in entries if isinstance(entry, MapsTo) and own.startswith(OPTIMIZER_PARAMS)]
        names = [own.removeprefix(OPTIMIZER_PARAMS) for own in known]
        nearest = did_you_mean(key.removeprefix(OPTIMIZER_PARAMS), names)
        return f"the optimizer {optimizer.names[0]} has no such key; it has {', '.join(names)}{nearest}"
    return "unknown key" + _suggestion(key)


def _suggestion(key: str) -> str:
    """Asks for the key that was probably meant: one of the same name in a dictionary, or one that is spelt alike."""
    _, _, name = key.rpartition(".")
    nested = [known for known in mapped_keys() if known.endswith(f".{name}")]
    return f"; did you mean {nested[0]}?" if len(nested) == 1 else did_you_mean(key, mapped_keys())


def _note_inert(item: Given, entry: Inert, flat: Flat, translation: Translation) -> None:
    refusal = mistyped(item.value, entry.accepts) or entry.check(item.value, flat)
    if refusal is not None:
        translation.problems.append(problem_with(item, refusal))
        return
    note = f"{item}: no effect: {entry.reason}"
    translation.inert.append(note)
    if item.value is False or item.value == {"enabled": False}:
        return
    if entry.warn:
        translation.warnings.append(note)
    else:
        translation.ignored.append(item.key)


def _set(
    item: Given, entry: MapsTo, flat: Flat, optimizer: OptimizerFacts[Any] | None, translation: Translation
) -> None:
    value: Converted = item.value
    # A conversion knows more values of a choice than the type: those that it replaces or refuses with a reason.
    is_choice = entry.accepts is None or "enum" in schema_of(entry.accepts)
    refusal = _secret_in(item) or (None if is_choice else mistyped(item.value, entry.accepts))
    if refusal is None and entry.convert is not None:
        try:
            value = entry.convert(item.value, flat)
        except RefusedError as refused:
            refusal = str(refused)
    field = _field_at(entry.path, optimizer_facts(value) if entry.path == _OPTIMIZER_TYPE else optimizer)
    if refusal is None and value is not UNSET and not field.accepts(value):
        refusal = expected(item.value, field.schema if entry.accepts is None else schema_of(entry.accepts))
    if refusal is not None:
        translation.problems.append(problem_with(item, refusal))
        translation.refused.add(entry.path)
    elif value is not UNSET:
        if type(item.value) is type(value) is int and value != item.value:
            translation.warnings.append(f"{item}: read as {value}: {entry.difference}")
        _settle(entry.path, Setting(value, item), translation)


def _field_at(path: str, optimizer: OptimizerFacts[Any] | None) -> Field:
    """Returns a value of the configuration, as the chosen optimizer declares it where that has one."""
    own = {} if optimizer is None else fields(optimizer.section)
    return own.get(path) or fields()[path]


def _secret_in(item: Given) -> str | None:
    """Says why a value with a password may not be: it would be written into run.json and into every checkpoint."""
    if not holds_secret_url(item.value):
        return None
    return (
        "a URL with a password or a token in it would be written into run.json and into every checkpoint; leave that "
        "out, and keep it in ~/.netrc or in the environment"
    )


def _settle(path: str, setting: Setting, translation: Translation) -> None:
    """Keeps one setting of a path: the command line's before the files'; else two keys must agree."""
    other = translation.settings.get(path)
    if other is None or _beats(setting, other):
        translation.settings[path] = setting
    elif other.value != setting.value and not _beats(other, setting) and setting.given is not None:
        translation.problems.append(problem_with(setting.given, f"contradicts {other.given}"))


def _beats(setting: Setting, other: Setting) -> bool:
    return setting.origin.kind == "command line" and other.origin.kind != "command line"


def _contradicted_switches(given: Mapping[str, Given], translation: Translation) -> None:
    """Reports a switch such as `fp16: {enabled: false}` beside a key that selects fp16; any other precision may be."""
    dtype = translation.settings.get("training.precision.dtype")
    for key, excluded in {"fp16.enabled": "fp16", "bf16.enabled": "bf16"}.items():
        switch = given.get(key)
        if switch is None or switch.value is not False or dtype is None or dtype.value != excluded:
            continue
        if not _beats(dtype, Setting(False, switch)):
            translation.problems.append(problem_with(switch, f"contradicts {dtype.given}"))


def _complete(translation: Translation, flat: Flat) -> None:
    """Settles what follows from other settings where NeoX's default would not do."""
    settings = translation.settings
    for source, kind in {"prompt": "prompt", "sample_input_file": "input-file"}.items():
        given, chosen = settings.get(f"generation.{source}"), settings.get("generation.text_gen_type")
        if given is not None and given.value is not None and (chosen is None or _beats(given, chosen)):
            settings["generation.text_gen_type"] = Setting(kind, given.given)
    if "model.architecture" in translation.refused:
        return
    implied = implied_architecture(flat)
    architecture = settings.setdefault("model.architecture", Setting(implied)).value
    facts = architecture_facts(architecture)
    is_named = "architecture" in flat or architecture != implied
    if facts is not None:
        derived = {name: value for name, derive in facts.derived.items() if (value := derive(flat)) is not None}
        for name, value in {**(facts.defaults if is_named else {}), **derived}.items():
            if f"model.{name}" not in translation.refused:
                settings.setdefault(f"model.{name}", Setting(value))
    for section in optional_sections():
        if facts is None or section not in facts.sections:
            _refuse_section(section, translation)


def _refuse_section(section: str, translation: Translation) -> None:
    """Takes the settings of an optional section out that the architecture does not have, and reports them."""
    architecture = translation.settings["model.architecture"]
    for path in [path for path in translation.settings if path.startswith(f"model.{section}.")]:
        given = translation.settings.pop(path).given
        if given is not None:
            owners = owners_of(section)
            message = f"only the {' or '.join(owners)} architecture has {optional_sections()[section]}, "
            message += f"and this is {show(architecture.value)}"
            message += f" ({architecture.given})" if architecture.given else f"; add architecture: {owners[0]}"
            translation.problems.append(problem_with(given, message))
