"""`make test-transformers` where there is no registry, and what it makes of pytest's report."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.commands import run_command
from tools.checks import run_transformers_tests as tool

REPORT = """<testsuites><testsuite>
<testcase classname="x.TestTokenFormer" name="test_a"/>
<testcase classname="x.TestTokenFormer" name="test_b"><skipped message="no GPU"/></testcase>
<testcase classname="x.TestTokenFormer" name="test_c"><failure message="1"/></testcase>
<testcase classname="x.TestTokenFormer" name="test_c"/>
<testcase classname="x.TestTokenFormer" name="test_d"><skipped message="moe"/></testcase>
<testcase classname="x.TestTokenFormer" name="test_d"/>
<testcase classname="x.TestGPTNeoX" name="test_a"><error message="x"/></testcase>
<testcase classname="x.TestGPTNeoX" name="test_b"/>
</testsuite></testsuites>"""


def test_without_a_registry_it_says_so(tmp_path: Path) -> None:
    finished = run_command(
        ["tools/checks/run_transformers_tests.py", "--cache", tmp_path / "cache"],
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
        PIP_CONFIG_FILE="/dev/null",
    )
    assert finished.returncode == 1
    assert "could not be fetched" in finished.stderr and "PIP_INDEX_URL" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "cache").exists()


def test_a_test_fails_with_any_of_its_subtests_and_is_skipped_with_all(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    text = tool.summary(tool.read_outcomes(tmp_path / "report.xml"))
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["TokenFormer", "2", "1", "1"],
        ["GPTNeoX", "1", "1", "0"],
    ]
    assert text.splitlines()[3:] == ["skipped here, passed by GPTNeoX: test_b: no GPU"]
