"""The openings of docstrings that `make checks` refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.checks.check_docstrings import wrong_openings


def openings(folder: Path, source: str) -> list[tuple[int, str]]:
    file = folder / "module.py"
    file.write_text(source)
    return [(each.line, each.opening) for each in wrong_openings(folder, [file])]


@pytest.mark.parametrize(
    "docstring",
    [
        "Returns the samples of a step.",
        "Counts tokens.",
        "Reads, merges and checks YAML files.",
        "Tells whether it is whole.",
    ],
)
def test_a_verb_in_the_third_person_is_right(tmp_path: Path, docstring: str) -> None:
    assert openings(tmp_path, f'def function():\n    """{docstring}"""\n') == []


@pytest.mark.parametrize(
    "docstring",
    [
        "The samples of a step.",
        "Return the samples of a step.",
        "Samples of a step.",
        "Seconds that a step takes.",
        "Which samples a step has.",
        "Whether it is whole.",
        "`load_config` of a list.",
        "returns the samples.",
    ],
)
def test_anything_else_is_named_with_its_line(tmp_path: Path, docstring: str) -> None:
    source = f'class Holder:\n    def _method(self):\n        """{docstring}"""\n'
    assert openings(tmp_path, source) == [(3, " ".join(docstring.split()[:6]))]


def test_modules_and_classes_may_be_nouns_but_no_questions(tmp_path: Path) -> None:
    assert openings(tmp_path, '"""Samples."""\nclass Sample:\n    """One sample."""\n') == []
    source = '"""What is read."""\nclass Sample:\n    """Where a sample lies."""\n'
    assert openings(tmp_path, source) == [(1, "What is read."), (3, "Where a sample lies.")]


def test_functions_without_a_docstring_are_left_alone(tmp_path: Path) -> None:
    assert openings(tmp_path, "def function():\n    return 'The text.'\n") == []
