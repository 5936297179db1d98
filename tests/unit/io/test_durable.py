"""Files and folders appear whole or not at all; what was there before survives a failure."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import CheckpointError, DataError
from megatron.io.durable import atomic_write, file_lock, new_folder, replace_durably


def test_an_atomic_write_appears_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@given(writers=st.integers(2, 40), pid=st.integers(1, 2**22))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_writers_with_one_process_id_have_temporary_files_of_their_own(writers: int, pid: int) -> None:
    """As on two machines, or in two containers."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("os.getpid", lambda: pid):
        path = Path(folder) / "index.npy"
        with contextlib.ExitStack() as stack:
            for number in range(writers):
                temporary = stack.enter_context(atomic_write(path))
                assert temporary.read_text() == "", "nobody else writes there"
                temporary.write_text(str(number))
        assert path.read_text() == "0", "the last to end has won, with all that it wrote"
        assert list(Path(folder).iterdir()) == [path]


def test_replacing_a_link_leaves_alone_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run.json").symlink_to(tmp_path / "precious")
    replace_durably(tmp_path / "run.json", "{}")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "run.json").is_symlink() and (tmp_path / "run.json").read_text() == "{}"


def test_a_failed_atomic_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match=r"file/inside\.txt: cannot be written"),
        atomic_write(tmp_path / "file/inside.txt"),
    ):
        pass


def test_replacing_uses_what_a_kill_has_left(tmp_path: Path) -> None:
    (tmp_path / "latest.tmp").write_text("half of an earlier one")
    replace_durably(tmp_path / "latest", "global_step7\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("latest", "global_step7\n")]


def test_a_new_folder_appears_at_its_end_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    with pytest.raises(ZeroDivisionError), new_folder(folder) as temporary:
        (temporary / "half").touch()
        raise ZeroDivisionError
    assert list(folder.parent.iterdir()) == []
    with new_folder(folder) as temporary:
        (temporary / "file").touch()
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["file"]
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"), new_folder(folder):
        pass


def test_a_lock_can_be_taken_again_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "lock"):
            raise ZeroDivisionError
