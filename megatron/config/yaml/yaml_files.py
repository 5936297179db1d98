"""Reads a YAML file into values that remember their lines, and writes new ones.

NeoX's YAMLs are YAML 1.1 read by PyYAML, whose surprises are not kept: `6e-4` is a number here, `12:30` and `010` are
text, only `true` and `false` are booleans (`yes`, `no`, `on` and `off` are text: some keys take `on` or `off`),
`None` is null like `null` and `~`, and a duplicate key is an error. A file may be hostile, or the wrong one: size,
depth, aliases and digits are limited far above what any configuration needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from megatron.config.yaml.problems import Origin, Problem, YamlValue, show, show_key
from megatron.errors import ConfigError
from megatron.io.checkout import hint_at_checkout

_TAG = "tag:yaml.org,2002:"

MAX_BYTES = 4 * 2**20
"""Size of a file [bytes]."""
MAX_DEPTH = 32
"""Lists and mappings inside one another."""
MAX_VALUES = 100_000
"""Values of a file, each counted as often as aliases repeat it."""
MAX_TEXT = 10_000
"""Characters of a text; as many as three paths of the greatest length that Linux has [characters]."""
MAX_KEY = 200
"""Characters of a key [characters]."""
MAX_DIGITS = 100
"""Characters of a number [characters]."""


class _Resolver(BaseResolver):
    """Types of plain scalars; everything that matches nothing here is text."""


_PATTERNS = (
    ("null", r"~|null|Null|NULL|None|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)"),
    ("float", r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
)
for _kind, _pattern in _PATTERNS:
    _Resolver.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"(?:{_pattern})\\Z"), None)


class _Loader(Reader, Scanner, Parser, Composer, _Resolver):
    """Composes nodes without constructing objects."""

    def __init__(self, stream: bytes | str) -> None:
        Reader.__init__(self, stream)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Resolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Builds a node, and those inside it; raises MarkedYAMLError when they are nested too deep."""
        if self._depth > MAX_DEPTH:
            problem = f"lists and mappings are nested more than {MAX_DEPTH} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self._mark())
        self._depth += 1
        try:
            return Composer.compose_node(self, parent, index)
        finally:
            self._depth -= 1

    def _mark(self) -> yaml.Mark:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        return mark


class _TooManyValuesError(Exception):
    """Aliases repeat more values than a file may have."""


@dataclass(frozen=True)
class LocatedValue:
    """A value in a YAML file; mappings hold further ones under keys with underscores."""

    value: bool | int | float | str | list[YamlValue] | dict[str, LocatedValue] | None
    line: int

    def plain(self) -> YamlValue:
        """Returns the value without line numbers."""
        if isinstance(self.value, dict):
            return {key: entry.plain() for key, entry in self.value.items()}
        return self.value


def read_yaml(file: Path) -> tuple[dict[str, LocatedValue], list[Problem]]:
    """Reads the top-level keys of a YAML (or JSON) file, hyphens turned into underscores, and what is wrong with it."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        return {}, [Problem(str(file), f"cannot be read: {reason}.{hint_at_checkout(file)}", Origin("file", file=file))]
    if len(content) > MAX_BYTES:
        message = f"is larger than {MAX_BYTES // 2**20} MiB, and so no configuration; is it the right file?"
        return {}, [Problem(str(file), message, Origin("file", file=file))]
    return _Document(file).entries(content)


def read_value(text: str) -> tuple[LocatedValue, list[Problem]]:
    """Reads a value given on the command line, written as in a YAML file."""
    return _Document(None).value(text)


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML would read as something else, and what this module would."""

    def ignore_aliases(self, data: Any) -> bool:
        """Tells that every value is written where it stands."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Represents a text, in quotes where it looks like another value."""
        # Both readers choose the type of a plain scalar by their patterns, in which one may see more than the other.
        kind = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        is_plain = kind == f"{_TAG}str" and text.isprintable()
        return self.represent_scalar(f"{_TAG}str", text, style=None if is_plain else '"')


_RESOLVER = _Resolver()
_Dumper.add_representer(str, _Dumper.represent_text)


def dump_yaml(keys: Mapping[str, Any]) -> str:
    """Writes keys as text that `read_yaml` reads as the same values, and so does NeoX."""
    return yaml.dump(dict(keys), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_new_yaml(path: Path, header: str, keys: Mapping[str, Any]) -> None:
    """Writes `header` and `keys` to `path`, which --write-config names.

    Raises ConfigError when the file exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(header + dump_yaml(keys))
    except FileExistsError as error:
        raise ConfigError(f"--write-config {path}: it exists. Give it as --config_file, or name another.") from error
    except OSError as error:
        raise ConfigError(f"--write-config {path}: cannot be written ({error.strerror}).") from error


class _Document:
    """Turns composed nodes into entries, and collects what is wrong on the way."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._open_nodes: set[int] = set()
        self._values = 0

    def entries(self, content: bytes) -> tuple[dict[str, LocatedValue], list[Problem]]:
        node = self._compose(content)
        if isinstance(node, yaml.MappingNode):
            try:
                return self._mapping(node), self.problems
            except _TooManyValuesError:
                return {}, self.problems
        if node is not None and node.tag != f"{_TAG}null":
            self._wrong(node, "expected keys and values")
        return {}, self.problems

    def value(self, text: str) -> tuple[LocatedValue, list[Problem]]:
        node = self._compose(text)
        try:
            return (LocatedValue(None, 0) if node is None else self._entry(node)), self.problems
        except _TooManyValuesError:
            return LocatedValue(None, 0), self.problems

    def _compose(self, content: bytes | str) -> yaml.Node | None:
        try:
            node = _Loader(content).get_single_node()
        except yaml.MarkedYAMLError as error:
            self._syntax_error(error, content)
            return None
        except ReaderError as error:
            self._add(0, f"is not UTF-8 text: {error.reason} at position {error.position}")
            return None
        except (ValueError, OverflowError):
            # PyYAML lets these out for \U with more than a character's number, and for %YAML with thousands of digits.
            self._add(0, "not valid YAML: an escape or a directive holds a number that is too large")
            return None
        return node if isinstance(node, yaml.Node) else None

    def _syntax_error(self, error: yaml.MarkedYAMLError, content: bytes | str) -> None:
        mark, problem = error.problem_mark, str(error.problem)
        line = mark.line + 1 if mark else 0
        if mark and isinstance(content, bytes) and problem.startswith("expected ',' or"):
            expected = problem.partition(", but")[0]
            self._add(_end_of_item(content, mark), f"not valid YAML: {expected} at the end of this line")
            return
        context = f"{error.context}, " if error.context else ""
        self._add(line, f"not valid YAML: {context}{problem}")

    def _add(self, line: int, message: str) -> None:
        where = "command line" if self.file is None else f"{self.file}:{line}" if line else str(self.file)
        self.problems.append(Problem(where, message, Origin("file", file=self.file, line=line)))

    def _wrong(self, node: yaml.Node, message: str) -> None:
        self._add(_line(node), message)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, LocatedValue]:
        self._require_tag(node, "map")
        entries: dict[str, LocatedValue] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                self._wrong(key_node, "expected a plain key; merge several files instead of `<<` or composite keys")
                continue
            key = key_node.value.replace("-", "_")
            if len(key) > MAX_KEY or not _is_text(key):
                self._wrong(key_node, f"expected a key of up to {MAX_KEY} letters, digits and underscores")
                continue
            if key in entries:
                self._wrong(key_node, f"duplicate key {show_key(key_node.value)}; also on line {entries[key].line}")
                continue
            entries[key] = LocatedValue(self._entry(value_node).value, _line(key_node))
        return entries

    def _entry(self, node: yaml.Node) -> LocatedValue:
        line = _line(node)
        self._values += 1
        if self._values > MAX_VALUES:
            self._wrong(node, f"more than {MAX_VALUES:,} values, with those that aliases repeat")
            raise _TooManyValuesError
        if isinstance(node, yaml.ScalarNode):
            return LocatedValue(self._scalar(node), line)
        if id(node) in self._open_nodes:
            self._wrong(node, "an alias that contains itself")
            return LocatedValue(None, line)
        self._open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return LocatedValue(self._mapping(node), line)
            self._require_tag(node, "seq")
            return LocatedValue([self._entry(item).plain() for item in _items(node)], line)
        finally:
            self._open_nodes.remove(id(node))

    def _require_tag(self, node: yaml.Node, tag: str) -> None:
        if node.tag != _TAG + tag:
            self._wrong(node, f"the tag {show(node.tag)} is not allowed")

    def _scalar(self, node: yaml.ScalarNode) -> bool | int | float | str | None:
        kind = node.tag.removeprefix(_TAG)
        refusal = _refusal(kind, node.value) if kind in _READ else f"the tag {show(node.tag)} is not allowed"
        if refusal is None:
            return _READ[kind](node.value)
        self._wrong(node, refusal)
        return None


_READ: Mapping[str, Callable[[str], bool | int | float | str | None]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text.replace("_", ""), 16 if "x" in text else 10),
    "float": lambda text: float(re.sub(r"\.(inf|nan)", r"\1", text.lower().replace("_", ""))),
    "str": str,
}
"""Types of scalars, and how the text of one is read once it is known to be of the type."""

_EXPECTED = {
    "null": "null",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}


def _refusal(kind: str, text: str) -> str | None:
    """Says why a scalar cannot be read as its type, which a tag may have given to any text; None when it can."""
    if kind == "str":
        if len(text) > MAX_TEXT:
            return f"a text of {len(text):,} characters; at most {MAX_TEXT:,} are read"
        return (
            None if _is_text(text) else "the text holds U+0000 or a lone surrogate, which no file can have in its name"
        )
    if kind in ("int", "float") and len(text) > MAX_DIGITS:
        return f"a number of {len(text):,} characters; at most {MAX_DIGITS} are read"
    if any(kind == known and re.fullmatch(pattern, text) for known, pattern in _PATTERNS):
        return None
    if kind == "float" and re.fullmatch(r"[-+]?[0-9][0-9_]*", text):
        return None
    return f"the tag !!{kind} stands before something else than {_EXPECTED[kind]}"


def _is_text(text: str) -> bool:
    """Tells whether a text can be written as UTF-8 and be a part of a file's name."""
    return re.search("[\0\ud800-\udfff]", text) is None


def _end_of_item(content: bytes, mark: yaml.Mark) -> int:
    """Returns the line, from 1, on which the item before `mark` ends: where a comma is missing."""
    lines = content.decode(errors="replace").splitlines()
    index = min(mark.line, len(lines) - 1)
    if not lines[index][: mark.column].strip():
        index -= 1
    while index > 0 and lines[index].partition("#")[0].strip() == "":
        index -= 1
    return index + 1


def _items(node: yaml.Node) -> Iterator[yaml.Node]:
    yield from node.value


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line
    return line + 1
