"""A preprocessing run that is killed, stopped or out of space goes on to the bytes of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare import tokenize_files as module
from megatron.errors import DataError
from tests.helpers.runs import ROOT
from tools.datasets.preprocess_data import main

WATCHED_EVENTS = ("open", "os.rename", "os.remove", "os.truncate")
TEXTS = [f"document {number}\n" * (number % 5) + "é" for number in range(60)]
NAME = "out_text_document"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two compressions of lines, one of which is malformed, and a whole file."""
    import gzip

    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[7] = "{"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines[:25]))
    (tmp_path / "in" / "b.txt").write_text("a whole file")
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[25:]).encode()))
    return tmp_path / "in"


def words(corpus: Path, output: Path, *more: str) -> list[str]:
    flags = ["--tokenizer-type", "CharLevelTokenizer", "--append-eod", "--max-bad-lines", "1", *more]
    return ["--input", str(corpus), "--output-prefix", str(output), *flags]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at(count: int, folder: Path) -> None:
    """Lets this process kill itself when it is about to do the thing number `count` to a file in `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in WATCHED_EVENTS and str(arguments[0]).startswith(f"{folder}/"):
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def killed_runs(corpus: Path, folder: Path, stride: int) -> Iterator[Path]:
    """Yields the folder of a run that was killed at the first thing done to a file, then `stride` things later, and
    so on."""
    for count in range(0, 1000, stride):
        output = folder / f"killed{count}"
        output.mkdir()
        child = os.fork()
        if child == 0:
            try:
                kill_at(count, output)
                main(words(corpus, output / "out"))
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            assert count > 30
            return
        yield output


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.full)])
def test_killed_at_every_step(stride: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BATCH_BYTES", 400)
    assert main(words(corpus, tmp_path / "whole" / "out")) == 0
    expected = files(tmp_path / "whole")
    assert set(expected) == {f"{NAME}.{kind}" for kind in ("bin", "idx", "manifest.json")}
    continued = 0
    for output in killed_runs(corpus, tmp_path, stride):
        try:
            IndexedDataset(output / NAME)
        except DataError:
            pass
        else:
            assert (output / f"{NAME}.idx").read_bytes() == expected[f"{NAME}.idx"]
        continued += (output / "out.progress.json").exists()
        # Its machine has forgotten the process: no wait for a sign of life.
        (output / "out.lease").unlink(missing_ok=True)
        assert main(words(corpus, output / "out")) == 0
        assert files(output) == expected
    assert continued > 20 // stride


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "tools/datasets/preprocess_data.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def long_corpus(folder: Path) -> Path:
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {number} of a text " * 40}) + "\n" for number in range(60_000)))
    return path


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_workers(process: subprocess.Popen[str], output: Path) -> list[int]:
    """Waits until the run has written tokens, and returns its processes."""
    deadline = time.monotonic() + 120
    while not any(path.suffix == ".partial" and path.stat().st_size > 10_000 for path in output.parent.glob("out*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return children(process.pid)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_a_signal_leaves_no_worker(number: int, tmp_path: Path) -> None:
    process = start(words(long_corpus(tmp_path), tmp_path / "out", "--workers", "2"))
    workers = wait_for_workers(process, tmp_path / "out")
    assert len(workers) >= 2
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in said
    assert not (tmp_path / f"{NAME}.idx").exists()
    assert_gone(workers)


@pytest.mark.full
def test_killed_at_random_moments(tmp_path: Path) -> None:
    corpus = long_corpus(tmp_path)
    (tmp_path / "whole").mkdir()
    assert main(words(corpus, tmp_path / "whole" / "out")) == 0
    expected = files(tmp_path / "whole")
    drawn = random.Random(0)
    (tmp_path / "killed").mkdir()
    for attempt in range(20):
        process = start(words(corpus, tmp_path / "killed" / "out", "--workers", str(1 + attempt % 2)))
        time.sleep(drawn.uniform(0.5, 8))
        process.kill()
        process.communicate()
        if (tmp_path / "killed" / f"{NAME}.manifest.json").exists():
            break
    assert main(words(corpus, tmp_path / "killed" / "out")) == 0
    assert files(tmp_path / "killed") == expected


def test_a_full_disk_is_told_and_survived(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BATCH_BYTES", 400)
    output = tmp_path / "full" / "out"
    assert main(words(corpus, tmp_path / "whole" / "out")) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written \(File too large\)\. Make room"):
            main(words(corpus, output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (output.parent / f"{NAME}.idx").exists()
    assert main(words(corpus, output)) == 0
    assert files(output.parent) == files(tmp_path / "whole")
