"""One writer per run folder: second starts, killed launchers, lost nodes, containers, folders that go away."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.io import lease
from megatron.monitor.event_log import read_events
from tests.helpers.commands import run_command
from tests.helpers.faults import at_step, before_each_file, this_rank
from tests.helpers.interrupted import TWO_RANKS, saved
from tests.helpers.records import records
from tests.helpers.runs import ROOT, Finished, run_ranks, start_ranks

ENDLESS = TWO_RANKS | {"train_iters": 100_000, "eval_iters": 0}
OF_ANOTHER_MACHINE = {"host": "node7", "node": "node7", "boot": "another"}


def leave_lease(run: Path, *, pid: int = 4711, stale: float = 2.0, **changed: str) -> Path:
    """Writes the lease of a process that no longer runs, as this machine's unless `changed`."""
    node, boot, namespace = lease._place()
    fields = {"pid": str(pid), "host": socket.gethostname(), "mode": "lease", "token": "0" * 32, "duration": str(stale)}
    fields |= {"start": "1", "node": node, "boot": boot, "namespace": namespace, "since": "2026-01-02 03:04:05 UTC"}
    fields |= {"what": "train.py, Slurm job 88"} | changed
    run.mkdir(exist_ok=True)
    file = run / lease.LEASE_FILE
    file.write_text("filelock/2\n" + "".join(f"{key}={value}\n" for key, value in fields.items()))
    return file


def fast_beats(seconds: float = 0.2) -> None:
    lease.BEAT_SECONDS = seconds


@pytest.fixture
def running(write_config: Callable[..., Path]) -> Iterator[tuple[Path, int]]:
    """A run of one rank in the folder that other starts want, and its process id."""
    ranks = start_ranks(write_config(ENDLESS), before=fast_beats)
    ranks.wait_for(" 5/100,000")
    yield write_config(ENDLESS), ranks.processes[0].pid or 0
    assert ranks.processes[0].is_alive(), ranks.output()
    ranks.kill()


def assert_refused(finished: Finished, pid: int, node: str = "") -> None:
    assert set(finished.codes) == {1}, finished.output
    assert "Traceback" not in finished.output
    machine = re.escape(node or socket.gethostname())
    holder = rf"process {pid} on {machine} \(train\.py\) since 20\d\d-\d\d-\d\d \d\d:\d\d"
    assert re.search(rf"CheckpointError: save: \S+/tiny is being written by {holder}", finished.output), finished.output


def test_a_second_start_names_the_holder_and_changes_nothing(running: tuple[Path, int]) -> None:
    config, pid = running
    run = config.with_suffix("")
    before = {path.name: path.stat().st_ino for path in run.iterdir()}
    assert_refused(run_ranks(config, ranks=2), pid)
    after = {path.name: path.stat().st_ino for path in run.iterdir()}
    assert before == after, "the second start has made, moved or replaced nothing"
    # Also where only the metrics would go to the same folder.
    finished = run_ranks(config, "save=null", f"log_dir={run}", "auto_resume=false")
    assert finished.code == 1 and f"log_dir: {run} is being written by process {pid}" in finished.output


@pytest.mark.full
def test_tools_respect_the_holder(running: tuple[Path, int], tokenformer: Checkpoint, dataset: Path) -> None:
    config, pid = running
    source = tokenformer.path
    larger = [str(source.parent.parent / "run.yml"), "ffn_slot_num=64", "ffn_scale_base=48", f"data_path={dataset}"]
    folders = ["--input_dir", str(source), "--output_dir", str(config.with_suffix(""))]
    finished = run_command(["tools/ckpts/grow.py", *folders, "--config_file", *larger])
    assert finished.returncode == 1, finished.stderr
    assert f"is being written by process {pid}" in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.full
def test_a_holder_in_another_process_namespace_is_seen_by_its_heartbeat(running: tuple[Path, int]) -> None:
    """As in two containers of one machine, where ids and /proc say nothing of each other."""
    config, pid = running
    command = ["unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--fork"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("unshare cannot make a process namespace here: it needs user namespaces")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    second = subprocess.run(
        [*command, sys.executable, "train.py", str(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert second.returncode == 1, second.stderr
    assert "which this machine cannot see: waiting 120 s for a sign of life" in second.stderr
    assert f"is being written by process {pid} on {socket.gethostname()}" in second.stderr
    assert "its heartbeat has been seen" in second.stderr


@pytest.mark.full
def test_ranks_of_a_killed_launcher_end_and_leave_the_folder_to_the_next(write_config: Callable[..., Path]) -> None:
    config = write_config(ENDLESS, num_gpus=2)
    run = config.with_suffix("")
    command = [sys.executable, "deepy.py", "train.py", str(config)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-3, stderr=-3, start_new_session=True) as deepy:
        wait_for_steps(run, 3)
        children = [int(pid) for pid in Path(f"/proc/{deepy.pid}/task/{deepy.pid}/children").read_text().split()]
        deepy.kill()
    begin = time.monotonic()
    finished = run_ranks(config, "train_iters=3", "checkpoint_factor=3")
    assert finished.code == 0, finished.output
    assert time.monotonic() - begin < lease.STALE_SECONDS / 2, "the next start goes on at once"
    assert f"process {children[0]} on" in finished.output and "has ended; going on in its place" in finished.output
    assert saved(run) == ["global_step3"]


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(records(run, "train/lm_loss")) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_lease_of_a_lost_node_becomes_stale(write_config: Callable[..., Path]) -> None:
    """A requeued job waits as long as the lost one had agreed to, says for whom, and goes on."""
    config = write_config(TWO_RANKS, train_iters=2)
    run = config.with_suffix("")
    file = leave_lease(run, **OF_ANOTHER_MACHINE)
    os.utime(file, (0, 0))  # whatever the clocks say
    finished = run_ranks(config, ranks=2)
    assert finished.codes == [0, 0], finished.output
    holder = "process 4711 on node7 (train.py, Slurm job 88) since 2026-01-02 03:04:05 UTC"
    assert f"save: {run} is leased to {holder}, which this machine cannot see: waiting 2 s" in finished.output
    assert f"{holder} gave no sign of life for 2 s; going on in its place" in finished.output
    assert saved(run) == ["global_step2"], "the lease is given back"


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"boot": "another"}, id="this machine before it was restarted, or another one of its name"),
        pytest.param(
            {"host": f"{socket.gethostname()}?pidns-1", "namespace": "pid:[1]"}, id="a container of this machine"
        ),
    ],
)
def test_what_this_machine_cannot_see_is_watched(changed: dict[str, str], tmp_path: Path) -> None:
    """Although this machine has no process of that number."""
    leave_lease(tmp_path, stale=0.8, **changed)
    claim = lease.FolderLease(tmp_path, "a test")
    begin = time.monotonic()
    assert not claim.attempt()
    while not claim.attempt():
        time.sleep(0.05)
    assert 0.8 <= time.monotonic() - begin < 10
    claim.release()
    assert list(tmp_path.iterdir()) == []


def lose_lease_at(step: int) -> None:
    """Rank 0 finds, at `step`, that another machine has taken it for dead; it has no other sign of it."""
    fast_beats()

    def take() -> None:
        run = Path(os.environ["RUN"])
        (run / lease.LEASE_FILE).unlink()
        leave_lease(run, **OF_ANOTHER_MACHINE)
        time.sleep(1.0)

    if this_rank() == 0:
        at_step(step, take)


def test_a_holder_that_was_taken_for_dead_writes_no_more(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(TWO_RANKS, checkpoint_factor=4)
    run = config.with_suffix("")
    monkeypatch.setenv("RUN", str(run))
    finished = run_ranks(config, f"save={run}", ranks=2, before=lose_at, arguments=(str(run), 6))
    assert finished.codes == [1, 1], finished.output
    assert f"save: {run} is now written by process 4711 on node7" in finished.output
    assert "Traceback" not in finished.output
    assert {path.name for path in run.glob("*global_step*")} == {"global_step4"}
    assert list(records(run, "train/lm_loss")) == [1, 2, 3, 4, 5], "the step that was under way is not recorded"
    assert "process 4711" in str(lease.FolderLease(run, "")._read()), "the other one's lease is left alone"


def lose_at(run: str, step: int) -> None:
    os.environ["RUN"] = run
    lose_lease_at(step)


def remove_at(run: str, step: int, parent: bool) -> None:
    """The run's folder is removed at `step`, or with the one that it lies in."""
    fast_beats()

    def remove() -> None:
        shutil.rmtree(Path(run).parent if parent else run)
        time.sleep(1.0)

    if this_rank() == 0:
        at_step(step, remove)


@pytest.mark.full
def test_a_folder_that_is_removed_is_made_again(write_config: Callable[..., Path]) -> None:
    config = write_config(TWO_RANKS, checkpoint_factor=4, log_batch_hashes=True)
    run = config.with_suffix("")
    whole = write_config(TWO_RANKS, "whole", checkpoint_factor=4, log_batch_hashes=True)
    assert run_ranks(whole, ranks=2).codes == [0, 0]
    finished = run_ranks(config, ranks=2, before=remove_at, arguments=(str(run), 6, False))
    assert finished.codes == [0, 0], finished.output
    lost = "batch_hashes.jsonl, events.jsonl, global_step4, latest, metrics.jsonl, run.json"
    assert f"save: {run} was removed while this process was writing it, and is made again. Gone with it: {lost}" in (
        finished.output
    )
    assert saved(run) == ["global_step12", "global_step8"]
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.with_suffix("").iterdir()} - {
        "global_step4"
    }
    for key in ("train/lm_loss", "valid/lm_loss"):
        assert records(run, key) == records(whole.with_suffix(""), key), "the record is whole again"
    told = [
        [event["event"] for event in read_events(folder / "events.jsonl")[0]] for folder in (run, whole.with_suffix(""))
    ]
    assert told[0] == told[1] == ["start", "save", "save", "save", "end"]
    for name in ("batch_hashes.jsonl", "run.json"):
        ours, theirs = ((folder / name).read_text() for folder in (run, whole.with_suffix("")))
        assert ours == theirs.replace(str(whole.with_suffix("")), str(run)).replace('"whole"', '"tiny"')


def remove_in_save(run: str, iteration: int) -> None:
    """The run's folder is removed while the checkpoint of `iteration` is written to it."""
    done = []

    def fault(content: Any, path: Path) -> None:
        if path.parent.name == f".global_step{iteration}.writing" and this_rank() == 0 and not done:
            done.append(path)
            shutil.rmtree(run)

    before_each_file(fault)


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_folder_that_is_removed_during_a_save(background: bool, write_config: Callable[..., Path]) -> None:
    """What is saved while training waits is saved once more; in the background, the next save has it."""
    config = write_config(TWO_RANKS, checkpoint_factor=4, async_save=background)
    run = config.with_suffix("")
    finished = run_ranks(config, ranks=2, before=remove_in_save, arguments=(str(run), 8))
    assert finished.codes == [0, 0], finished.output
    assert re.search(
        r"is made again\. Gone with it: (events\.jsonl, )?global_step4, latest, (metrics\.jsonl, )?run\.json",
        finished.output,
    )
    assert "the checkpoint of step 8 was removed while it was saved" in finished.output
    assert saved(run) == (["global_step12"] if background else ["global_step12", "global_step8"])
    assert list(records(run, "train/lm_loss")) == list(range(1, 13))
    assert (run / "run.json").exists()


@pytest.mark.full
def test_a_folder_that_is_removed_with_what_it_lies_in_ends_the_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    """As when a file system is no longer mounted: its place is on another disk."""
    run = tmp_path / "mounted" / "run"
    config = write_config(TWO_RANKS, save=str(run), checkpoint_factor=4)
    finished = run_ranks(config, ranks=2, before=remove_at, arguments=(str(run), 6, True))
    assert finished.codes == [1, 1], finished.output
    assert f"save: {run} is gone, with what it lay in" in finished.output and "Traceback" not in finished.output
    assert not run.parent.exists()
