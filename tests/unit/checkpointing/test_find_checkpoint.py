"""Which checkpoint is loaded, and what is said of those that are not."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.store import find_checkpoint as search
from megatron.checkpointing.store import manifest
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.manifest import FileEntry
from megatron.errors import CheckpointError
from megatron.io import progress
from tests.helpers.checkpoints import CONFIG, STATE, save
from tools.ckpts import inspect_checkpoint


def found(folder: Path, iteration: int | None = None, level: str = "full") -> Checkpoint:
    checkpoint = find_checkpoint(folder, iteration, level)  # type: ignore[arg-type]
    assert checkpoint is not None
    return checkpoint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated tensors": (lambda path: truncate(path / "layer_00.pt"), r"layer_00\.pt has [\d,]+ bytes instead of"),
    "deleted tensors": (lambda path: (path / "layer_00.pt").unlink(), r"layer_00\.pt is missing"),
    "flipped byte in tensors": (lambda path: flip_byte(path / "layer_00.pt"), r"layer_00\.pt is damaged: its SHA-256"),
    "flipped byte in state": (lambda path: flip_byte(path / "state.json"), r"state\.json"),
    "flipped byte in config": (lambda path: flip_byte(path / "config.json"), r"config\.json is damaged: its SHA-256"),
    "flipped byte in manifest": (lambda path: flip_byte(path / "manifest.json"), r"manifest\.json"),
    "deleted state": (lambda path: (path / "state.json").unlink(), r"state\.json cannot be read"),
    "deleted manifest": (lambda path: (path / "manifest.json").unlink(), r"no manifest\.json"),
    "empty manifest": (lambda path: (path / "manifest.json").write_text(""), r"manifest\.json cannot be read"),
    "foreign manifest": (lambda path: (path / "manifest.json").write_text("[1]"), r"manifest\.json cannot be read"),
    "planted tensors": (lambda path: (path / "layer_01.pt").touch(), r"layer_01\.pt is not in its manifest"),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()] and None, r"no manifest\.json"),
}


def test_the_newest_is_found_and_read_back(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    checkpoint = found(tmp_path)
    assert checkpoint.state == replace(STATE, iteration=20)
    assert checkpoint.config == CONFIG
    assert checkpoint.manifest.layout == {"tensor": 1, "pipe": 1, "data": 1}
    assert checkpoint.manifest.files.keys() == {"layer_00.pt", "state.json", "config.json"}
    assert (tmp_path / "latest").read_text() == "global_step20\n"


def test_a_named_one_is_found(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    assert found(tmp_path, 10).state.iteration == 10
    assert found(tmp_path / "global_step10").state.iteration == 10
    (tmp_path / "best").symlink_to(tmp_path / "global_step10")
    assert found(tmp_path / "best").state.iteration == 10


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, None, "full") is None
    assert find_checkpoint(tmp_path / "missing", None, "full") is None
    (tmp_path / ".global_step10.writing").mkdir()
    (tmp_path / "global_step_notes").mkdir()
    (tmp_path / "global_step10").touch()
    assert find_checkpoint(tmp_path, None, "full") is None


def test_a_named_one_that_is_not_there(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"global_step15: no such checkpoint\. Iterations there: 10\."):
        find_checkpoint(tmp_path, 15, "full")
    with pytest.raises(CheckpointError, match="is not the checkpoint of iteration 15"):
        find_checkpoint(tmp_path / "global_step10", 15, "full")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_an_older_one_taken(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inflict, message = DAMAGE[kind]
    save(tmp_path, 10)
    inflict(save(tmp_path, 20))
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path).state.iteration == 10
    assert f"{tmp_path}: passed over global_step20: " in caplog.text
    assert "Going back to global_step10" in caplog.text
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(tmp_path, 20, "full")
    shutil.rmtree(tmp_path / "global_step10")
    with pytest.raises(
        CheckpointError, match=rf"none of its checkpoints is whole\.\n  global_step20: (.|\n)*{message}"
    ):
        find_checkpoint(tmp_path, None, "full")


@pytest.fixture
def removed_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that its run removes as soon as somebody looks at its tensors, beside an older one that it keeps."""
    save(tmp_path, 10)
    path = save(tmp_path, 20)

    def damage(folder: Path, files: Mapping[str, FileEntry], level: Any) -> list[str]:
        if path.exists() and folder == path:
            path.rename(tmp_path / ".global_step20.removed")
        return manifest.damage(folder, files, level)

    for reader in (search, inspect_checkpoint):
        monkeypatch.setattr(reader, "damage", damage)
    return path


def test_one_that_retention_removes_meanwhile_is_not_called_damaged(
    removed_while_read: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert found(removed_while_read.parent).state.iteration == 10
    assert f"{removed_while_read} was removed while it was read" in caplog.text
    assert "missing" not in caplog.text


def test_a_named_one_that_retention_removes_meanwhile(removed_while_read: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was removed while it was read.*Load a newer one"):
        find_checkpoint(removed_while_read, None, "full")


def test_the_inspector_s_is_removed_meanwhile(removed_while_read: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was removed while it was read.*Load a newer one"):
        inspect_checkpoint.main([str(removed_while_read)])


def test_sizes_alone_do_not_tell_a_flipped_byte(tmp_path: Path) -> None:
    flip_byte(save(tmp_path, 10) / "layer_00.pt")
    assert found(tmp_path, level="sizes").state.iteration == 10
    truncate(tmp_path / "global_step10" / "layer_00.pt")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        find_checkpoint(tmp_path, None, "sizes")


@pytest.mark.parametrize("name", ["state.json", "config.json"])
def test_what_is_small_is_always_compared_with_its_hash(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 10) / name
    file.write_text(file.read_text().replace("10", "11"))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its SHA-256 differs"):
        find_checkpoint(tmp_path, None, "sizes")


def test_damage_to_what_is_older_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truncate(save(tmp_path, 10) / "layer_00.pt")
    save(tmp_path, 20)
    assert found(tmp_path).state.iteration == 20
    assert caplog.text == ""


@pytest.mark.parametrize("content", ["global_step10", "global_step99", "../elsewhere", ""])
def test_a_stale_latest_is_not_trusted(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "latest").write_text(content)
    assert found(tmp_path).state.iteration == 20
    assert f"`latest` says {content!r}, but the newest whole checkpoint is global_step20" in caplog.text
    (tmp_path / "latest").unlink()
    assert found(tmp_path).state.iteration == 20


def test_the_newest_is_the_one_saved_last(tmp_path: Path) -> None:
    """A run that went back to step 10 and saved step 15 goes on from there, not from its earlier step 20."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    save(tmp_path, 15)
    assert found(tmp_path).state.iteration == 15


def test_a_damaged_one_that_was_saved_last_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    truncate(save(tmp_path, 15) / "layer_00.pt")
    assert found(tmp_path).state.iteration == 20
    assert "passed over global_step15: layer_00.pt has" in caplog.text and "Going back to global_step20" in caplog.text


@pytest.mark.parametrize("name", ["../outside.pt", "/etc/passwd", "sub/layer.pt", ".."])
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 10) / "manifest.json"
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("layer_00.pt")
    del content["sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(content | {"sha256": hashlib.sha256(canonical.encode()).hexdigest()}))
    with pytest.raises(CheckpointError, match="is not a file of the checkpoint's folder"):
        find_checkpoint(tmp_path, 10, "full")


def test_a_file_of_a_checkpoint_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    file = save(tmp_path, 10) / "layer_00.pt"
    file.rename(tmp_path / "elsewhere.pt")
    file.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match=r"layer_00\.pt leads out of the folder"):
        find_checkpoint(tmp_path, 10, "sizes")


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save(tmp_path, 10).rename(tmp_path / "global_step20")
    with pytest.raises(CheckpointError, match="it is of step 10, which its name does not say"):
        find_checkpoint(tmp_path, 20, "full")


@pytest.mark.parametrize("content", ["", "{", '{"format": 2}', '{"format": 99}', "[]"])
def test_a_foreign_state_is_named(tmp_path: Path, content: str) -> None:
    (save(tmp_path, 10) / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"global_step10/state\.json"):
        find_checkpoint(tmp_path, None, "full")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content | {"unheard": "of"}, "unheard: Extra inputs are not permitted. The"),
        (lambda content: {**content, "model": content["model"] | {"norm": "future"}}, "model.norm: Input should be"),
        (lambda content: {key: content[key] for key in content if key != "model"}, "model: Field required. The"),
        (lambda content: content | dict.fromkeys("abcde", 1), "c: Extra inputs are not permitted; and 2 more. The"),
        (lambda content: [content], "Input should be an object. The"),
        (lambda content: None, "Input should be an object. The"),
    ],
    ids=["unknown key", "unknown value", "missing section", "many", "list", "null"],
)
def test_a_configuration_of_another_version_is_an_error(
    change: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    file = save(tmp_path, 10) / "config.json"
    checkpoint = found(tmp_path)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError) as caught:
        _ = checkpoint.config
    assert "global_step10/config.json cannot be understood: " in str(caught.value)
    assert reason in str(caught.value)
    assert "written by an unknown commit. Load it with that version of the code" in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None])
def test_a_malformed_configuration_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    file = save(tmp_path, 10) / "config.json"
    checkpoint = found(tmp_path)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be understood: .*, or, if the file was changed"):
        _ = checkpoint.config


def test_a_long_verification_shows_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10)
    with caplog.at_level(logging.INFO):
        found(tmp_path)
        assert "verified" not in caplog.text
        monkeypatch.setattr(progress, "monotonic", count(0, 60).__next__)
        found(tmp_path)
    assert caplog.text.count("GiB of this rank's share") == 3
