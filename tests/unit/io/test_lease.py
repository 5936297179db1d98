"""A folder's lease: damaged, refused, given back."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.errors import CheckpointError
from megatron.io import lease
from megatron.io.durable import new_folder
from megatron.io.lease import LEASE_FILE, FolderLease, leased


def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"save: .*file/run cannot be written \(Not a directory\)"):
        FolderLease(tmp_path / "file" / "run", "", key="save").acquire()


@pytest.mark.parametrize("content", ["", "filelock/2\npid=1", "\0" * 2000, "half a li"])
def test_a_lease_that_a_power_loss_has_cut_is_watched_and_taken(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    (tmp_path / LEASE_FILE).write_text(content)
    begin = time.monotonic()
    with leased(tmp_path, ""):
        assert time.monotonic() - begin >= 0.5
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told of the first, and does not delete what that has written."""
    monkeypatch.setattr(lease, "EXIT_SECONDS", 0.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    output = tmp_path / "exported"
    refusals: list[str] = []

    def second() -> None:
        try:
            with new_folder(output):
                pass
        except CheckpointError as error:
            refusals.append(str(error))

    with new_folder(output) as temporary:
        (temporary / "weights").touch()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refusals and f"{output} is being written by process {os.getpid()}" in refusals[0]
    assert [path.name for path in output.iterdir()] == ["weights"]
    assert list(tmp_path.iterdir()) == [output]


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), leased(tmp_path / "run", ""):
            raise ZeroDivisionError
    assert list((tmp_path / "run").iterdir()) == []


def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(tmp_path: Path) -> None:
    """This process has the number of one that was killed before it started."""
    with leased(tmp_path, "train.py"):
        text = (tmp_path / LEASE_FILE).read_text()
    start = next(line for line in text.splitlines() if line.startswith("start="))
    (tmp_path / LEASE_FILE).write_text(text.replace(start, f"start={int(start.removeprefix('start=')) - 1}"))
    claim = FolderLease(tmp_path, "train.py")
    assert claim.attempt(), "at once"
    claim.release()


def test_the_heartbeat_starts_again_after_an_outage_of_the_file_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.6)

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    claim = FolderLease(tmp_path, "train.py")
    claim.acquire()
    with monkeypatch.context() as outage:
        outage.setattr("filelock._lease.touch", unreachable)
        wait_until(lambda: claim.is_in_doubt)
    assert claim.check() and not claim.is_in_doubt
    before = (tmp_path / LEASE_FILE).stat().st_mtime_ns
    wait_until(lambda: (tmp_path / LEASE_FILE).stat().st_mtime_ns > before)
    claim.release()


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)
