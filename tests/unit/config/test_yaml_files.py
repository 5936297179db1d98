"""YAML 1.1's surprises, and line numbers."""

import math
from pathlib import Path

import pytest
import yaml

from megatron.config.yaml.yaml_files import read_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 0.0006),
        ("1E5", 1e5),
        ("1.0e-8", 1e-8),
        (".5", 0.5),
        ("-3.", -3.0),
        ("1_000.5", 1000.5),
        ("12", 12),
        ("!!float 12", 12.0),
        ("!!str 12", "12"),
        ("!!int 0x1F", 31),
        ("-7", -7),
        ("500_000_000", 500_000_000),
        ("0x1F", 31),
        ("0", 0),
        ("010", "010"),
        ("12:30", "12:30"),
        ("1:2:3", "1:2:3"),
        ("2024-01-01", "2024-01-01"),
        ("969, 30, 1", "969, 30, 1"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("n", "n"),
        ("null", None),
        ("None", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("'6e-4'", "6e-4"),
        ('"true"', "true"),
        ("[1, 2.5, a, null]", [1, 2.5, "a", None]),
        ('[[["tokenformer"], 12]]', [[["tokenformer"], 12]]),
        ("{a-b: 1, c: {d: [2]}}", {"a_b": 1, "c": {"d": [2]}}),
    ],
)
def test_values(text: str, value: object) -> None:
    entry, problems = read_value(text)
    assert problems == []
    assert entry.plain() == value
    assert type(entry.plain()) is type(value)


def test_infinities_are_numbers_for_the_types_to_refuse() -> None:
    assert read_value("-.inf")[0].value == -math.inf
    assert math.isnan(read_value(".NaN")[0].value)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["6e-4", "12:30", "010", "yes"])
def test_pyyaml_reads_these_otherwise(text: str) -> None:
    """The traps are real: without our resolver, PyYAML gives another value."""
    assert yaml.safe_load(text) != read_value(text)[0].plain()


def test_lines_of_keys_and_values_that_follow(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text('{\n  # comment\n  "a-b": 1,\n  "long":\n    [1,\n     2],\n  "c": {"d": 3}, }\n')
    entries, problems = read_yaml(file)
    assert problems == []
    assert {key: entry.line for key, entry in entries.items()} == {"a_b": 3, "long": 4, "c": 7}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_a_file_without_keys_sets_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(text)
    assert read_yaml(file) == ({}, [])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.yml", "No such file"), (tmp_path, "Is a directory")):
        _, (problem,) = read_yaml(path)
        assert str(problem).startswith(f"{path}: cannot be read: {reason}")
