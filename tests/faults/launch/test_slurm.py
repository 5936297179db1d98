"""The sbatch script under bash, with stand-ins for srun and scontrol: when it queues its job again, and when not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import ROOT
from tests.helpers.tensor_files import assert_same_checkpoint

SCRIPT = ROOT / "configs" / "clusters" / "train.sbatch"

SRUN = """\
import json, os, signal, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")][:2]
command = sys.argv[1 + len(options):]
ranks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [rank.send_signal(number) for rank in ranks])
slurm = {"SLURM_STEP_NUM_TASKS": "2"}
with open("srun.json", "w") as file:
    json.dump({"options": options, "command": command, "environment": dict(os.environ), "pid": os.getpid()}, file)
for rank in "01":
    environment = os.environ | slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    ranks.append(subprocess.Popen(command, env=environment))
codes = [rank.wait() for rank in ranks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """\
import os, sys
with open("scontrol.log", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost\\nanother-node")
elif "CANNOT_REQUEUE" in os.environ:
    sys.exit("slurm_requeue error: Requested operation is presently disabled")
"""
RANK = "import os, sys; sys.exit(int(os.environ['CODES'].split()[int(os.environ['SLURM_PROCID'])]))\n"
JOB_ID = 100_000 + os.getpid()
"""Another one in each process that tests: the port on which the ranks meet follows from it."""


class Job:
    """A job's folder, in which the commands are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, source in {"srun": SRUN, "scontrol": SCONTROL, "rank": RANK}.items():
            command = folder / "bin" / name
            command.parent.mkdir(exist_ok=True)
            command.write_text(f"#!{sys.executable}\n{source}")
            command.chmod(0o755)

    def start(self, *arguments: str, python: str | None = None, **environment: str) -> subprocess.Popen[str]:
        job = {
            "SLURM_JOB_ID": str(JOB_ID),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "PYTHON": python or str(self.folder / "bin/rank"),
        }
        job |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.folder,
            env=os.environ | job | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def requeued(self) -> int:
        """How often the job was queued again."""
        return (self.folder / "scontrol.log").read_text().splitlines().count(f"requeue {JOB_ID}")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [("0 0", 0, 0), ("75 75", 0, 1), ("1 1", 1, 0), ("2 2", 2, 0), ("75 137", 137, 0), ("143 143", 143, 0)],
)
def test_only_a_run_that_stopped_on_request_is_queued_again(codes: str, code: int, requeued: int, job: Job) -> None:
    script = job.start(CODES=codes)
    assert script.wait(30) == code
    assert job.requeued == requeued


def test_a_job_that_may_not_be_queued_again_keeps_the_code(job: Job) -> None:
    script = job.start(CODES="75 75", CANNOT_REQUEUE="1")
    _, said = script.communicate(timeout=30)
    assert script.returncode == 75
    assert "presently disabled" in said and "the run can go on" in said and "submit it again" in said


def test_what_the_ranks_are_given(job: Job) -> None:
    assert job.start("tokenformer/150M", "save=a b", CODES="0 0", SLURM_CPUS_PER_TASK="6").wait(30) == 0
    srun = json.loads((job.folder / "srun.json").read_text())
    assert srun["command"][1:] == ["train.py", "-d", "configs", "clusters/slurm", "tokenformer/150M", "save=a b"]
    environment = srun["environment"]
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("localhost", str(20000 + JOB_ID % 12000))
    assert environment["SRUN_CPUS_PER_TASK"] == "6"
    assert (job.folder / "scontrol.log").read_text() == "show hostnames node[1-2]\n"


def test_a_cancelled_job_is_not_queued_again(job: Job, tmp_path: Path) -> None:
    """scancel sends SIGTERM to the script and the ranks alike."""
    (tmp_path / "bin" / "rank").write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nopen('ready', 'w').close()\ntime.sleep(60)\n"
    )
    script = job.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    script.terminate()
    os.kill(json.loads((tmp_path / "srun.json").read_text())["pid"], signal.SIGTERM)
    assert script.wait(30) == -signal.SIGTERM
    assert job.requeued == 0


@pytest.mark.full
def test_a_run_over_several_starts(job: Job, write_config: Callable[..., Path]) -> None:
    """train.py on two ranks of Slurm, twice stopped: by USR1 to the job's steps, and by exit_interval."""
    # The script's own YAML says num_workers.
    base = {key: value for key, value in TOKENFORMER.items() if key != "num_workers"}
    base |= {"train_micro_batch_size_per_gpu": 2, "train_iters": 100, "eval_iters": 0}
    config = write_config(base)
    for name in ("train.py", "megatron"):
        (job.folder / name).symlink_to(ROOT / name)
    (job.folder / "configs").symlink_to(ROOT / "configs")
    script = job.start(str(config), "num_workers=0", python=sys.executable)
    metrics = config.with_suffix("") / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert script.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(json.loads((job.folder / "srun.json").read_text())["pid"], signal.SIGUSR1)
    assert script.wait(60) == 0
    assert job.requeued == 1
    assert job.start(str(config), "num_workers=0", "exit_interval=90", python=sys.executable).wait(120) == 0
    assert job.requeued == 2
    assert job.start(str(config), "num_workers=0", python=sys.executable).wait(120) == 0
    assert job.requeued == 2
    whole = write_config(base, "whole")
    assert job.start(str(whole), "num_workers=0", python=sys.executable).wait(120) == 0
    assert_same_checkpoint(config.with_suffix("") / "global_step100", whole.with_suffix("") / "global_step100")
