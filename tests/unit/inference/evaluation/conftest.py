"""No evaluation asks the hub, and lm-eval indexes its own tasks once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval.tasks
import pytest
from lm_eval.tasks._index import TaskIndex


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the hub away: what it would hold is not there."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True, scope="package")
def one_index() -> Iterator[None]:
    """Keeps the index of lm-eval's ten thousand YAMLs, which takes seconds to build, from test to test."""
    defaults = Path(lm_eval.tasks.__file__).parent
    build = TaskIndex.build

    @cache
    def index_of_defaults() -> dict[str, Any]:
        return build([defaults])

    def build_rest(paths: Iterable[Path], **options: Any) -> dict[str, Any]:
        first, *rest = paths
        return index_of_defaults() | build(rest, **options) if first == defaults else build([first, *rest], **options)

    with mock.patch.object(TaskIndex, "build", staticmethod(build_rest)):
        yield
