"""Runs that save to a store: kills in mid-upload, empty disks, stores that cannot be reached."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import run_ranks, start_ranks, train
from tests.helpers.stores import CREDENTIALS, free_port, s3_server, use_s3
from tests.helpers.tensor_files import assert_same_checkpoint

SAVING: dict[str, Any] = TOKENFORMER | {
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 6,
    "checkpoint_factor": 2,
    "keep_last_n_checkpoints": 1,
    "eval_iters": 0,
    "auto_resume": True,
}


def quick_store(endpoint: str | None) -> None:
    from megatron.checkpointing.store import remote_folder, uploads

    remote_folder.PAUSE_SECONDS, uploads.FIRST_PAUSE_SECONDS, uploads.LONGEST_PAUSE_SECONDS = 0.1, 0.2, 0.2
    if endpoint is not None:
        use_s3(endpoint)


def kill_in_upload(endpoint: str | None, step: int) -> None:
    """Kills the run when half of the third file of a checkpoint is on its way."""
    from megatron.checkpointing.store import remote_folder

    quick_store(endpoint)
    original = remote_folder.RemoteFolder._send
    sent: list[str] = []

    def send(self: Any, source: Path, target: str, entry: Any) -> None:
        if source.parent.name == f"global_step{step}":
            sent.append(source.name)
        if len(sent) == 3:
            remote_folder.BLOCK_BYTES = entry.size // 2
            written = remote_folder.RemoteFolder._written

            class Cut:
                def __init__(self, file: Any) -> None:
                    self.file = file

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *error: object) -> None:
                    raise AssertionError("the process is dead by then")

                def write(self, block: bytes) -> None:
                    with self.file as file:
                        file.write(block)
                        os.kill(os.getpid(), signal.SIGKILL)

            self._written = lambda path: Cut(written(self, path))
        original(self, source, target, entry)

    remote_folder.RemoteFolder._send = send  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    import json

    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "run.yml"
    paths = {"data_path": str(dataset), "save": str(folder / "run"), "index_cache_dir": str(folder)}
    config.write_text(json.dumps(SAVING | paths))
    train(config)
    return folder / "run"


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.full)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str | None]]:
    """URL of a store, and the endpoint of its server."""
    if request.param == "file":
        yield f"file://{tmp_path}/store/run", None
        return
    with s3_server() as endpoint:
        yield "s3://bucket/run", endpoint


def test_a_kill_in_mid_upload_and_an_empty_disk(
    write_config: Callable[..., Path], uninterrupted: Path, store: tuple[str, str | None], tmp_path: Path
) -> None:
    url, endpoint = store
    config = write_config(SAVING, save_remote=url)
    run = config.with_suffix("")
    killed = run_ranks(config, before=kill_in_upload, arguments=(endpoint, 4))
    assert killed.codes == [-signal.SIGKILL], killed.output
    shutil.rmtree(run)
    finished = run_ranks(config, before=quick_store, arguments=(endpoint,))
    assert finished.codes == [0], finished.output
    assert f"auto_resume: fetching global_step2 from {url}" in finished.output
    assert_same_checkpoint(run / "global_step6", uninterrupted / "global_step6")
    assert not (run / ".uploading").exists()
    # Another run starts from what is there now, by its URL.
    other = write_config(SAVING, "other", load=f"{url}/global_step4", remote_cache_dir=str(tmp_path / "cache"))
    loaded = run_ranks(other, "auto_resume=false", before=quick_store, arguments=(endpoint,))
    assert loaded.codes == [0], loaded.output
    assert_same_checkpoint(other.with_suffix("") / "global_step6", uninterrupted / "global_step6")
    everything = killed.output + finished.output + loaded.output
    for written in (file for folder in (run, other.with_suffix("")) for file in folder.rglob("*.json*")):
        everything += written.read_text()
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in everything
    assert CREDENTIALS["AWS_ACCESS_KEY_ID"] not in everything


@pytest.mark.full
def test_a_store_that_refuses_does_not_end_the_run(write_config: Callable[..., Path]) -> None:
    port = free_port()
    with s3_server():
        pass  # here for its reason to skip
    config = write_config(SAVING, save_remote="s3://bucket/run", auto_resume=False)
    refused = run_ranks(config, before=quick_store, arguments=(f"http://127.0.0.1:{port}",))
    assert refused.codes == [0], refused.output
    assert "The run begins all the same, and uploads when it can" in refused.output
    assert "save_remote: global_step6 is not uploaded: s3://bucket/run: " in refused.output
    assert "The next start sends " in refused.output
    with s3_server(port) as endpoint:
        again = run_ranks(config, "auto_resume=true", before=quick_store, arguments=(endpoint,))
    assert again.codes == [0], again.output
    assert all(f"uploaded global_step{step} to s3://bucket/run" in again.output for step in (2, 4, 6)), again.output


@pytest.mark.full
def test_a_store_that_comes_back_gets_everything(write_config: Callable[..., Path]) -> None:
    port = free_port()
    changes = {"train_iters": 100_000, "checkpoint_factor": None, "extra_save_iters": [2, 4]}
    config = write_config(SAVING, save_remote="s3://bucket/run", auto_resume=False, **changes)
    with s3_server():
        pass
    ranks = start_ranks(config, before=quick_store, arguments=(f"http://127.0.0.1:{port}",))
    ranks.wait_for("global_step2 is not uploaded yet, and will be tried again")
    with s3_server(port):
        ranks.wait_for("uploaded global_step4 to s3://bucket/run", timeout=240)
        ranks.signal(0, signal.SIGTERM)
        stopped = ranks.wait()
    assert stopped.codes == [75], stopped.output
    assert "is not uploaded: " not in stopped.output


def test_an_empty_disk_and_a_store_that_cannot_be_asked(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A fresh start could be a run of weeks begun anew."""
    (tmp_path / "file").write_text("")
    config = write_config(SAVING, save_remote=f"file://{tmp_path}/file/run")
    finished = run_ranks(config, before=quick_store, arguments=(None,))
    assert finished.codes == [1] and "Traceback" not in finished.output, finished.output
    assert "Without it nobody knows whether this run has begun" in finished.output
    assert "remove `save_remote` to start afresh" in finished.output
