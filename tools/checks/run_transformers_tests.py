"""Runs transformers' own common tests of models on the modelling file that ships with every export.

    python tools/checks/run_transformers_tests.py [-k EXPRESSION ...]        words for pytest, such as -k tp_forward

The mixins are those of the installed version. Its source distribution holds them; pip fetches that once, from the
registry that pip is configured for, into --cache. GPTNeoX runs the same tests beside it as the yardstick. What a test
skips here although GPTNeoX passes it is listed with the reason. Returns 1 when a test of TokenFormer fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.errors import EnvironmentSetupError
from megatron.io.durable import new_folder
from megatron.registry import install_extra, require
from tools.command_line import tool_parser

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "peers" / "transformers_common.py"
ABSENT = (
    "exporters/test_export",
    "generation/test_utils",
    "utils/test_configuration_utils",
    "distributed_testing_utils",
)
"""Modules that the mixins import and the source distribution leaves out: tests/peers/absent_from_sdist.py stands in."""
OURS, YARDSTICK = "TestTokenFormer", "TestGPTNeoX"
OUTCOMES = ("passed", "failed", "skipped")


def main(argv: Sequence[str]) -> int:
    """Runs the tests, prints the counts, and returns 1 when one of TokenFormer's has failed."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--cache", type=local_path, default=default_cache(), help="where the mixins are kept (%(default)s)"
    )
    args, pytest_words = parser.parse_known_args(argv)
    require("transformers", "make test-transformers", install_extra("dev"))
    mixins = fetched_mixins(args.cache, version("transformers"))
    require("parameterized", "make test-transformers", install_extra("dev"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run_tests(mixins, report, pytest_words)
        if not report.exists():
            return 1
        outcomes = read_outcomes(report)
    print(summary(outcomes))
    return int(not outcomes.get(OURS) or any(what == "failed" for what, _ in outcomes[OURS].values()))


def default_cache() -> Path:
    """Returns the user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-tokenformer"


def fetched_mixins(cache: Path, release: str) -> Path:
    """Returns the package of mixins of a release of transformers, fetched unless `cache` holds it.

    Raises EnvironmentSetupError where pip finds no source distribution, or where that holds no tests.
    """
    package = cache / f"transformers-{release}" / "transformers_common"
    if package.exists():
        return package
    with tempfile.TemporaryDirectory() as folder:
        words = [
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            folder,
            f"transformers=={release}",
        ]
        print(f"fetching the source distribution of transformers {release}", file=sys.stderr)
        pip = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if pip.returncode or not archives:
            reason = next(iter(reversed(pip.stderr.strip().splitlines())), "no archive came")
            raise EnvironmentSetupError(
                f"make test-transformers: the source distribution of transformers {release} could not be fetched: "
                f"{reason}. It needs a package registry; give pip one (PIP_INDEX_URL), or run this once where there "
                f"is one and bring {package.parent} here."
            )
        with tarfile.open(archives[0]) as archive:
            tests = [member for member in archive if Path(member.name).match("*/tests/test_*.py")]
            archive.extractall(folder, members=tests, filter="data")
        if not tests:
            raise EnvironmentSetupError(f"{archives[0].name} holds no tests/test_*.py: this release ships no mixins.")
        with new_folder(package.parent) as new:
            target = new / package.name
            shutil.copytree(Path(folder) / Path(tests[0].name).parent, target)
            (target / "__init__.py").touch()
            for name in ABSENT:
                stand_in = target / f"{name}.py"
                stand_in.parent.mkdir(exist_ok=True)
                stand_in.write_text("from tests.peers.absent_from_sdist import *\n")
    return package


def run_tests(mixins: Path, report: Path, pytest_words: Sequence[str]) -> None:
    """Runs pytest on the mixins without the network, its report as JUnit's XML in `report`."""
    paths = [str(ROOT), str(mixins.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRANSFORMERS_TESTS": str(mixins),
        "HF_HUB_OFFLINE": "1",
    }
    # The mixins carry markers of transformers' own pytest configuration.
    words = ["-q", "-p", "no:xdist", "-o", "addopts=", "-W", "ignore::pytest.PytestUnknownMarkWarning"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *words, f"--junitxml={report}", *pytest_words, str(TESTS)],
        cwd=ROOT,
        env=environment,
        check=False,
    )


def read_outcomes(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Reads, by class and test, the outcome and, where it was skipped, the reason.

    A test with subtests has several entries: it failed if one failed, and was skipped only if all were.
    """
    outcomes: dict[str, dict[str, tuple[str, str]]] = {}
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - as above
        name, owner = case.get("name", "").split(" ")[0], case.get("classname", "").rpartition(".")[2]
        tests = outcomes.setdefault(owner, {})
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            now = ("failed", "")
        elif skipped is not None:
            now = ("skipped", skipped.get("message", ""))
        else:
            now = ("passed", "")
        order = ("skipped", "passed", "failed")
        tests[name] = max(tests.get(name, now), now, key=lambda outcome: order.index(outcome[0]))
    return outcomes


def summary(outcomes: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """Returns the counts of both models, and the tests that only GPTNeoX passes."""
    lines = [f"{'':18}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
    for owner, tests in sorted(outcomes.items(), reverse=True):
        counts = Counter(what for what, _ in tests.values())
        lines.append(f"{owner.removeprefix('Test'):18}" + "".join(f"{counts[outcome]:9}" for outcome in OUTCOMES))
    for name, (what, reason) in outcomes.get(OURS, {}).items():
        if what != "passed" and outcomes.get(YARDSTICK, {}).get(name, ("", ""))[0] == "passed":
            lines.append(f"{what} here, passed by GPTNeoX: {name}{reason and ': ' + reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
