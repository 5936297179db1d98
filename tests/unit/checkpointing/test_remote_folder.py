"""Checkpoints in a store: whole or not at all, verified in both directions, and never another run's."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from megatron.checkpointing.store import remote_folder, uploads
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.checkpointing.store.fetch import local_source, restore_newer
from megatron.checkpointing.store.manifest import damage
from megatron.checkpointing.store.remote_folder import RemoteError, RemoteFolder
from megatron.checkpointing.store.uploads import UPLOADING, Uploads
from megatron.config.load_config import load_config
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import CheckpointError, EnvironmentSetupError
from tests.helpers.checkpoints import save
from tests.helpers.forkserver import ROOT

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_folder, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(uploads, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    place = f"memory://{uuid.uuid4().hex}/run"
    yield place
    if MEMORY.exists(place):
        MEMORY.rm(place, recursive=True)


def config(**values: Any) -> CheckpointConfig:
    return CheckpointConfig.model_validate(values)


def test_there_and_back(url: str, tmp_path: Path) -> None:
    remote = RemoteFolder(f"{url}/")
    assert remote.steps() == [] and remote.newest() is None and remote.manifest(5) is None
    sent = [save(tmp_path / "run", step) for step in (5, 10)]
    for checkpoint in sent:
        assert remote.upload(checkpoint) > 0
        assert remote.upload(checkpoint) == 0, "the same is there already"
    assert remote.steps() == [5, 10]
    newest = remote.newest()
    assert newest is not None and newest[0] == 10 and newest[1] == read_checkpoint(sent[1]).manifest
    fetched = remote.download(10, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in sent[1].iterdir()
    }
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["global_step10"]
    with pytest.raises(CheckpointError, match="holds no whole checkpoint of step 7"):
        remote.download(7, tmp_path / "cache")


def test_the_manifest_comes_last_and_goes_first(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an upload that breaks off at any file leaves no checkpoint, also where it replaces one."""
    checkpoint = save(tmp_path / "run", 5)
    remote = RemoteFolder(url)
    names = [*read_checkpoint(checkpoint).manifest.files, "manifest.json"]
    original = RemoteFolder._written
    for place in range(len(names)):
        written = iter(range(len(names)))

        def break_off(self: Any, path: str, place: int = place, written: Any = written) -> Any:
            if next(written) == place:
                raise ConnectionResetError("cut")
            return original(self, path)

        monkeypatch.setattr(RemoteFolder, "_written", break_off)
        with pytest.raises(RemoteError, match="ConnectionResetError: cut"):
            remote.upload(checkpoint)
        assert remote.steps() == []
        monkeypatch.setattr(RemoteFolder, "_written", original)
        remote.upload(checkpoint)
        assert remote.steps() == [5]
        save(tmp_path / "run", 5)
        assert read_checkpoint(checkpoint).manifest.sequence == place + 2


def test_a_file_that_breaks_off_does_not_appear(tmp_path: Path) -> None:
    """In memory it does, as fsspec's memory takes what is written at once."""
    url = f"file://{tmp_path}/store"
    checkpoint = save(tmp_path / "run", 5)
    name = next(name for name in read_checkpoint(checkpoint).manifest.files if name.endswith(".pt"))
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)
    remote = RemoteFolder(url)
    with pytest.raises(CheckpointError, match=f"{name} is not what its manifest says"):
        remote.upload(checkpoint)
    assert not remote._files.exists(remote._path(5, name))


def test_another_runs_checkpoint_is_not_replaced(url: str, tmp_path: Path) -> None:
    remote = RemoteFolder(url)
    remote.upload(save(tmp_path / "run", 5))
    with pytest.raises(CheckpointError, match="holds global_step5 of another run, which is not replaced"):
        remote.upload(save(tmp_path / "other", 5, run_id="another"))
    own = read_checkpoint(save(tmp_path / "third", 4, run_id="another"))
    with pytest.raises(CheckpointError, match="holds checkpoints of another run than"):
        restore_newer(config(save=str(tmp_path / "third"), save_remote=url), tmp_path / "third", own)


def test_what_is_damaged_there_is_not_taken(url: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", 5)
    remote = RemoteFolder(url)
    remote.upload(checkpoint)
    name = next(name for name in read_checkpoint(checkpoint).manifest.files if name.endswith(".pt"))
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    remote._files.pipe_file(remote._path(5, name), bytes(content))
    with pytest.raises(RemoteError, match=f"{name} is damaged: its SHA-256 differs"):
        remote.download(5, tmp_path / "cache")
    assert not (tmp_path / "cache" / "global_step5").exists()
    remote._files.pipe_file(remote._path(5, name), (checkpoint / name).read_bytes())
    fetched = remote.download(5, tmp_path / "cache")
    assert damage(fetched, read_checkpoint(fetched).manifest.files, "full") == []


def test_a_manifest_that_leads_elsewhere_is_refused(url: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", 5)
    remote = RemoteFolder(url)
    remote.upload(checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["../outside"] = manifest["files"].pop("config.json")
    remote._files.pipe_file(remote._path(5, "manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match="damaged: its SHA-256 differs"):
        remote.download(5, tmp_path / "cache")
    assert not (tmp_path / "outside").exists()


def test_a_url_in_load(url: str, tmp_path: Path) -> None:
    remote = RemoteFolder(url)
    for step in (5, 10):
        remote.upload(save(tmp_path / "run", step))
    cached = config(remote_cache_dir=str(tmp_path / "cache"))
    assert local_source(url, None, cached).name == "global_step10"
    assert local_source(url, 5, cached).name == "global_step5"
    assert local_source(f"{url}/global_step5", None, cached).name == "global_step5"
    assert read_checkpoint(local_source(f"{url}/global_step5/", 5, cached)).state.iteration == 5
    with pytest.raises(CheckpointError, match=r"holds no checkpoint of iteration 7\. Iterations there: 5, 10"):
        local_source(url, 7, cached)
    with pytest.raises(CheckpointError, match="is not the checkpoint of iteration 7"):
        local_source(f"{url}/global_step5", 7, cached)
    assert local_source(str(tmp_path / "run"), None, cached) == tmp_path / "run"


def test_a_newer_checkpoint_there_is_restored(url: str, tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    older = read_checkpoint(save(disk, 5))
    save(run, 5)
    RemoteFolder(url).upload(save(run, 10))
    settings = config(save=str(disk), save_remote=url)
    assert restore_newer(settings, disk, older)
    assert read_checkpoint(disk / "global_step10").manifest.sequence == 2
    assert (disk / "latest").read_text() == "global_step10\n"
    assert not restore_newer(settings, disk, read_checkpoint(disk / "global_step10"))


def test_uploads_survive_retention_and_a_store_that_fails(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="megatron")
    back = threading.Event()
    original = RemoteFolder.upload

    def upload(self: RemoteFolder, checkpoint: Path) -> int:
        if not back.is_set():
            raise RemoteError("refused")
        return original(self, checkpoint)

    monkeypatch.setattr(RemoteFolder, "upload", upload)
    run = tmp_path / "run"
    queued = Uploads(RemoteFolder(url), run)
    for step in (5, 10):
        checkpoint = save(run, step)
        queued.add(checkpoint)
        checkpoint.rename(tmp_path / f"removed{step}")
    while "global_step5 is not uploaded yet, and will be tried again: refused" not in caplog.text:
        assert not RemoteFolder(url).steps()
    queued.finish()
    assert f"global_step10 is not uploaded: refused. The next start sends {run / UPLOADING}" in caplog.text
    back.set()
    Uploads(RemoteFolder(url), run).finish()
    assert RemoteFolder(url).steps() == [5, 10]
    assert not (run / UPLOADING).exists()


def test_a_missing_package_is_named() -> None:
    with pytest.raises(EnvironmentSetupError, match=r"\[remote\]") as caught:
        RemoteFolder("notaprotocol://bucket/run")
    assert "notaprotocol" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "save=s3://bucket/run",
            "save to a folder, and set save_remote: s3://bucket/run, which uploads every checkpoint",
        ),
        ("save_remote=runs/x", "save_remote.*expected a URL such as s3://bucket/run"),
        ("load=https://huggingface.co/a/b", "the name of that model is a/b"),
        ("s3_path=s3://user:secret@bucket/run", "s3_path"),
    ],
)
def test_urls_in_configurations(override: str, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        load_config([ROOT / "configs" / "demo.yml"], [override])
    assert "secret@" not in str(caught.value)


def test_neox_names_the_same() -> None:
    demo = ROOT / "configs" / "demo.yml"
    assert load_config([demo], ["s3_path=s3://bucket/run"]).run.checkpoint.save_remote == "s3://bucket/run"
    assert load_config([demo], ["load=s3://bucket/run"]).run.checkpoint.load == "s3://bucket/run"
    with pytest.raises(Exception, match=r"save_remote.*needs save: the folder from which checkpoints are uploaded"):
        load_config([demo], ["save_remote=s3://bucket/run", "save=null"])
