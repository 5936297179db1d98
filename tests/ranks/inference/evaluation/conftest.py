"""Ranks that evaluate are forked from a process that has imported lm-eval."""

from __future__ import annotations

from tests.helpers.forkserver import preload_evaluation


def pytest_collection_finish() -> None:
    """Comes before the first fork, when tests of this folder are among those to run."""
    preload_evaluation()
