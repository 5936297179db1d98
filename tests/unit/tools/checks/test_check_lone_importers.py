"""Modules with a single importer: which ones count, and the list of their reasons."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.checks.check_lone_importers import importers_of, lone_modules, missing_and_stale

FILES = {
    "housing/__init__.py": "",
    "housing/shared.py": "",
    "housing/alone.py": "from housing import shared",
    "housing/top.py": "from housing.alone import thing\nfrom housing.registry import VARIANTS",
    "housing/registry.py": 'VARIANTS = Registry("variant", package="housing.variants")',
    "housing/variants/__init__.py": "",
    "housing/variants/first.py": "from housing.registry import VARIANTS",
    "housing/command.py": 'if __name__ == "__main__":\n    pass',
    "housing/dead.py": "",
    "tools/tool.py": "import housing.shared",
    "script.py": "from housing import top",
}


@pytest.fixture
def importers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return importers_of(tmp_path, "housing")


def test_importers_are_modules_tools_and_scripts(importers: dict[str, list[str]]) -> None:
    assert importers["housing.shared"] == ["housing.alone", "tools/tool.py"]
    assert importers["housing.alone"] == ["housing.top"]
    assert importers["housing.top"] == ["script.py"]
    assert importers["housing.registry"] == ["housing.top", "housing.variants.first"]
    assert importers["housing.dead"] == []


def test_packages_variants_and_modules_that_are_run_do_not_count(importers: dict[str, list[str]]) -> None:
    assert not {"housing", "housing.variants", "housing.variants.first", "housing.command"} & set(importers)


def test_a_module_with_one_importer_is_lone_unless_a_command_is_that_importer(importers: dict[str, list[str]]) -> None:
    assert set(lone_modules(importers)) == {"housing.alone", "housing.dead"}


def test_missing_and_stale_reasons_are_named() -> None:
    lone = {"a.listed": ["a.user"], "a.unlisted": ["a.user"], "a.dead": []}
    found = list(missing_and_stale(lone, {"a.listed": "its own idea", "a.gone": "was one"}))
    assert [line.partition(":")[0] for line in found] == ["a.unlisted", "a.dead", "a.gone"]
    assert "a.user" in found[0] and "nobody" in found[1] and "stale" in found[2]
    assert list(missing_and_stale({"a.listed": ["a.user"]}, {"a.listed": "its own idea"})) == []
