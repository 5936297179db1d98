"""Another package called `megatron`: it is named, with what to do, before anything else goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.covers import covered

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "tools").rglob("*.py") if "__main__" in path.read_text("utf-8")
)
SCRIPT = ("-c", "import train")
"""Imports a script with its folder first on the path, as Python has it when the script is run."""


def run(site: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the checkout whose packages come after those in `site`."""
    path = os.pathsep.join([str(site), str(ROOT), str(ROOT / "tools" / "start")])
    environment = os.environ | {"PYTHONPATH": path} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages into which megatron-core is installed: a package in `megatron`, which has no __init__.py."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").touch()
    info = tmp_path / "megatron_core-0.16.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.16.1\n")
    (info / "top_level.txt").write_text("megatron\n")
    return tmp_path


@pytest.mark.parametrize("command", [SCRIPT, ("tools/ckpts/reshape.py", "--help")])
def test_both_installed(site: Path, command: tuple[str, ...]) -> None:
    ended = run(site, *command)
    assert ended.returncode == 0, ended.stderr
    assert (
        f"megatron-core 0.16.1 is installed here too, and its package has the same name: `megatron` is now {ROOT}"
        in (" ".join(ended.stderr.split()))
    )
    assert "pip uninstall megatron-core" in ended.stderr


def test_both_installed_is_said_by_one_rank(site: Path) -> None:
    assert run(site, "-c", "import megatron", RANK="0").stderr
    assert not run(site, "-c", "import megatron", RANK="1").stderr


@pytest.mark.parametrize("tool", covered(TOOLS, TOOLS[::10]))
def test_ours_shadowed(site: Path, tool: str) -> None:
    (site / "megatron" / "__init__.py").touch()
    ended = run(site, tool)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"EnvironmentSetupError: `megatron` is {site}/megatron, not {ROOT}/megatron. It is that of megatron-core: "
        "uninstall it (pip uninstall megatron-core), or give this project an environment of its own, as `make` does.\n"
    )


def test_scripts_in_the_root_find_ours_whatever_comes_first_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise RuntimeError")
    ended = run(tmp_path, *SCRIPT)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("package", ["megatron", "tools"])
def test_shadowed_by_a_checkout_of_another_project(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    ended = run(tmp_path, "tools/ckpts/reshape.py", "--help")
    assert ended.returncode == 1
    assert f"`{package}` is {tmp_path / package}" in ended.stderr
    assert f"Take {tmp_path} off Python's path (PYTHONPATH)" in ended.stderr


def test_another_checkout_of_ours_is_installed(tmp_path: Path) -> None:
    for package in ("megatron", "tools"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "tools" / "start").mkdir()
    shutil.copy(ROOT / "tools" / "start" / "megatron_tokenformer.py", tmp_path / "tools" / "start")
    ended = run(tmp_path, "tools/ckpts/reshape.py", "--help")
    assert ended.returncode == 1
    assert f"`megatron` is {tmp_path}/megatron, not {ROOT}/megatron. It is another checkout's: install" in ended.stderr
