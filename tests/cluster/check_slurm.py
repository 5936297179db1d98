"""A Slurm of two nodes on this machine, with a configuration of its own: `python -m tests.cluster.check_slurm`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from tests.cluster.launched_runs import (
    LauncherCheck,
    Runs,
    daemon,
    expect,
    require_programs,
    runs_in_temporary_folder,
)
from tests.helpers.forkserver import ROOT

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
}
NODES = ("127.0.0.1", "127.0.0.2")
"""Names of the nodes, which are addresses that ranks can reach as well."""
GPUS = 2
SLURM_CONF = """\
ClusterName=check
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:2
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nConstrainCores=no\n"
GRES_CONF = "AutoDetect=off\nName=gpu File=/dev/tty[0-1]\n"


def free_ports(count: int) -> list[int]:
    """Returns ports on which nothing listens."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in held]


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Runs munged, slurmctld and two slurmd from a folder of their own; yields the variables of their clients."""
    folder.mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder, ports=free_ports(3), nodes=NODES))
    (folder / "cgroup.conf").write_text(CGROUP_CONF)
    (folder / "gres.conf").write_text(GRES_CONF)
    sockets = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    files = [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"]
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = os.environ | variables
    with contextlib.ExitStack() as stack:
        stack.enter_context(daemon(program("munged"), *sockets, *files, log=folder / "munged.out"))
        wait_until((folder / "munge.socket").exists, folder)
        stack.enter_context(daemon(program("slurmctld"), "-D", log=folder / "ctld.out", environment=environment))
        for node in NODES:
            command = (program("slurmd"), "-D", "-N", node)
            stack.enter_context(daemon(*command, log=folder / f"slurmd-{node}.out", environment=environment))
        wait_until(lambda: idle_nodes(environment) == len(NODES), folder)
        try:
            yield variables
        finally:
            subprocess.run(["scancel", "--user=root", "--full"], env=environment, check=False, capture_output=True)
            wait_until(lambda: not queue(environment), folder)


def program(name: str) -> str:
    """Returns the path of a daemon, whose folder is not on every user's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"])) or name


def queue(environment: Mapping[str, str]) -> str:
    """Returns the jobs that there are."""
    command = ["squeue", "--noheader", "--format=%i %T %r"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def idle_nodes(environment: Mapping[str, str]) -> int:
    """Counts the nodes that wait for work."""
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return found.stdout.split().count("idle")


def wait_until(holds: Callable[[], object], folder: Path, seconds: float = 60.0) -> None:
    """Waits until something holds; fails with the daemons' logs."""
    deadline = time.monotonic() + seconds
    while not holds():
        logs = "\n".join(f"{file.name}: {file.read_text()[-500:]}" for file in folder.glob("*.log"))
        expect(time.monotonic() < deadline, logs)
        time.sleep(0.2)


def run(runs: Runs, command: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command of Slurm in the folder of runs."""
    return subprocess.run(
        command,
        cwd=runs.work,
        env={**runs.environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def start_directly(runs: Runs, variables: Mapping[str, str]) -> None:
    """Starts train.py and deepy.py by srun, without a meeting point: it is one run of two ranks."""
    for script in (("train.py",), ("deepy.py", "train.py")):
        begin = time.monotonic()
        name = f"srun {script[0]}"
        command = runs.command(name, ["pipe_parallel_size=2"], script=script)
        finished = run(runs, ["srun", "--nodes=2", "--ntasks=2", *command], variables)
        expect(finished.returncode == 0, finished.stdout + finished.stderr)
        check = LauncherCheck(runs, "slurm", [])
        check.compare(name)
        check.passed(f"`srun --nodes=2 python {' '.join(script)}` is one run, losses of one process", begin)


def in_an_allocation(runs: Runs, variables: Mapping[str, str]) -> None:
    """Starts deepy.py without a key in a batch job of two nodes: it finds the allocation by itself."""
    begin = time.monotonic()
    command = runs.command("allocation", ["pipe_parallel_size=2"])
    script = runs.work / "job.sh"
    script.write_text('#!/bin/bash\nexec "$@"\n')
    flags = ["--nodes=2", "--ntasks=2", "--wait", f"--output={runs.folder}/allocation.log"]
    finished = run(runs, ["sbatch", *flags, str(script), *command], variables)
    text = (runs.folder / "allocation.log").read_text()
    expect(finished.returncode == 0, finished.stderr + text)
    expect("2 ranks by launcher: slurm" in text, text)
    check = LauncherCheck(runs, "slurm", [])
    check.compare("allocation")
    check.passed("`sbatch`, and `deepy.py train.py` in it, finds its two nodes, losses of one process", begin)


PLACES = """\
import os
from megatron.launch.environment import adopt_launcher_environment
adopt_launcher_environment(os.environ)
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
print(*(os.environ.get(name, "none") for name in names))
"""


def one_gpu_each(runs: Runs, variables: Mapping[str, str]) -> None:
    """Asks for a GPU for each task: each sees one, and takes it."""
    begin = time.monotonic()
    python = [sys.executable, "-c", PLACES]
    flags = ["--nodes=1", f"--ntasks={GPUS}", "--gpus-per-task=1"]
    for more, want in (([], {"0"}), (["--gpu-bind=none"], {"0", "1"})):
        finished = run(runs, ["srun", *flags, *more, *python], variables)
        expect(finished.returncode == 0, finished.stderr)
        found = [line.split() for line in finished.stdout.splitlines()]
        expect({place[2] for place in found} == want, f"{more}: {found}")
    check = LauncherCheck(runs, "slurm", [])
    check.passed("`srun --gpus-per-task=1`: each rank takes the one GPU that it sees", begin)


def requeues(runs: Runs, variables: Mapping[str, str]) -> None:
    """Sends the requeueing script's job its USR1: it saves, is queued again by itself, and goes on."""
    begin = time.monotonic()
    folder = runs.work / "requeued"
    # The cluster's YAML has a num_workers of its own.
    model = runs.work / "requeued.yml"
    keys = yaml.safe_load((runs.work / "tiny model.yml").read_text())
    model.write_text(yaml.safe_dump({key: value for key, value in keys.items() if key != "num_workers"}))
    words = [str(model), f"save={folder}", "pipe_parallel_size=2", "num_workers=0"]
    words += ["train_iters=1000000", "lr_decay_iters=1000000"]
    flags = ["--nodes=2", "--ntasks=2", "--parsable", f"--output={runs.folder}/requeued.log", f"--chdir={ROOT}"]
    script = str(ROOT / "configs" / "clusters" / "train.sbatch")
    submitted = run(runs, ["sbatch", *flags, script, *words], {**variables, "PYTHON": sys.executable})
    job = submitted.stdout.strip()
    expect(job.isdigit(), submitted.stderr)
    log = runs.folder / "requeued.log"
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(runs.losses_of("requeued")) > 2, runs.folder, 200)
    run(runs, ["scancel", "--signal=USR1", job], variables)
    wait_until(lambda: "going on from" in log.read_text(), runs.folder, 200)
    run(runs, ["scancel", job], variables)
    wait_until(lambda: not queue({**os.environ, **variables}), runs.folder)
    print(
        f"slurm: train.sbatch saves on USR1, is queued again by itself and goes on ({time.monotonic() - begin:.0f} s)"
    )


def main() -> None:
    """Runs the checks of Slurm."""
    require_programs(PROGRAMS, root=True)
    with runs_in_temporary_folder() as runs, slurm(runs.folder / "slurm") as variables:
        one_gpu_each(runs, variables)
        start_directly(runs, variables)
        in_an_allocation(runs, variables)
        LauncherCheck(runs, "slurm", ["launcher=slurm", "num_nodes=2", "num_gpus=1"], variables).all()
        requeues(runs, variables)
    print("check_slurm: passed")


if __name__ == "__main__":
    main()
