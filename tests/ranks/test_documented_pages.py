"""Readers follow the pages of the documentation from top to bottom, in a fresh folder for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.documentation import Command, pages, steps
from tests.helpers.documented_folder import DocumentedFolder

TUTORIAL = "docs/tutorial.md"
"""tests/ranks/test_tutorial.py follows it, and looks at what comes out."""
FOLLOWED = [
    page
    for page in pages()
    if page != TUTORIAL and any(not isinstance(step, Command) or step.reason is None for step in steps(page))
]
SECONDS = 1800
"""Time that all commands of a page may take on a busy machine [s]."""


@pytest.fixture(scope="session")
def taken_for_granted(tmp_path_factory: pytest.TempPathFactory) -> DocumentedFolder:
    """The data and the runs that pages speak of without making them, each made when a page first does."""
    return DocumentedFolder(tmp_path_factory.mktemp("taken_for_granted"))


@pytest.mark.full
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("page", FOLLOWED)
def test_every_command_of_the_page_works(page: str, tmp_path: Path, taken_for_granted: DocumentedFolder) -> None:
    folder = DocumentedFolder(tmp_path / "reader", taken_for_granted)
    for step in steps(page):
        if not isinstance(step, Command) or step.reason is None:
            folder.follow(step)
