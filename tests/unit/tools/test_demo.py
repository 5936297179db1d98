"""The demo leaves alone what it did not make, and nothing of its own when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.commands import run_command
from tools.demo import default_name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of an earlier demo, which took its owner long to train."""
    folder = tmp_path / "demo"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "latest").write_text("global_step100000")
    return folder


def test_an_earlier_demo_stays(trained: Path) -> None:
    before = contents(trained.parent)
    for words in ([], ["--text", "README.md"], ["--text", "/nope.txt"]):
        finished = run_command(["tools/demo.py", "--output-dir", str(trained), *words])
        assert finished.returncode == 1
        assert "Traceback" not in finished.stderr
        assert contents(trained.parent) == before
    assert "/nope.txt: no such file" in finished.stderr
    finished = run_command(["tools/demo.py", "--output-dir", str(trained)])
    assert f"{trained} is there already, and stays as it is" in finished.stderr
    assert f"rm -r {trained}" in finished.stderr


@pytest.mark.parametrize("text", ["too short to train on", None], ids=["short", "missing"])
def test_a_demo_that_fails_leaves_nothing(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "mine.txt"
    if text is not None:
        path.write_text(text)
    before = sorted(tmp_path.iterdir())
    finished = run_command(["tools/demo.py", "--text", str(path), "--output-dir", str(tmp_path / "demo")])
    assert finished.returncode == 1
    assert ("at least 20,000 are needed" if text else "no such file") in finished.stderr
    assert "Traceback" not in finished.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_each_text_has_a_folder_of_its_own() -> None:
    names = {None: "demo", "mine.txt": "demo-mine", "a b/../c.jsonl.zst": "demo-c", "my text.txt": "demo-my-text"}
    assert {text: default_name(None if text is None else Path(text)) for text in names} == names


def test_words_that_are_no_overrides_are_refused() -> None:
    finished = run_command(["tools/demo.py", "mine.txt"])
    assert finished.returncode == 2
    assert "mine.txt: not a key=value; a text is given with --text" in finished.stderr
