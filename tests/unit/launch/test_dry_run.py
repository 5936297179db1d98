"""`deepy.py train.py ... --dry-run` prints what each launcher would be given, and starts nothing."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deepy
from megatron.errors import ConfigError, EnvironmentSetupError
from tests.helpers.configs import TOKENFORMER
from tests.helpers.forkserver import ROOT

SECRET = "planted"  # noqa: S105 - what must not be shown
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURMD_NODENAME": "n1"}


@pytest.fixture
def shown(
    tmp_path: Path,
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., list[list[str]]]:
    """Runs the command with keys, in a place where every launcher is installed; returns the words of each line."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("ssh", "pdsh", "srun", "mpirun", "mpiexec", "sinfo"):
        (programs / name).write_text("#!/bin/sh\nexit 1\n")
        (programs / name).chmod(0o700)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    config = write_config(TOKENFORMER, "a; name", model_parallel_size=1, pipe_parallel_size=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    for name in ("WANDB_API_KEY", "NCCL_PASSWORD", "TORCH_TOKEN"):
        monkeypatch.setenv(name, SECRET)

    def run(*keys: str, **environment: str) -> list[list[str]]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert deepy.main(["train.py", str(config), *keys, "--dry-run"]) == 0
        output = capsys.readouterr().out
        assert SECRET not in output
        return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]

    return run


def node_job(line: list[str]) -> dict[str, object]:
    """Reads the description at the end of a line for another machine's shell."""
    word = shlex.split(line[-1])[-1]
    described: dict[str, object] = json.loads(base64.urlsafe_b64decode(word))
    assert SECRET not in str(described)
    return described


def test_ranks_of_this_machine(shown: Callable[..., list[list[str]]]) -> None:
    first, second = shown("num_gpus=2", "master_port=29871")
    assert {"RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=29871"} <= set(second)
    assert "RANK=0" in first
    assert first[first.index(sys.executable) + 1] == str(ROOT / "train.py")


def test_ssh_to_each_machine(shown: Callable[..., list[list[str]]]) -> None:
    lines = shown("hostfile=hosts", "launcher_args=['-p', '2222']", "master_port=29871")
    assert [line[:3] for line in lines] == [["ssh", "-p", "2222"]] * 2
    assert [line[-2] for line in lines] == ["node1", "node2"]
    remote = shlex.split(lines[1][-1])
    assert remote[:4] == [sys.executable, str(ROOT / "deepy.py"), "--on-node", "1"]
    described = node_job(lines[1])
    assert (described["master_addr"], described["master_port"]) == ("node1", 29871)
    assert described["slots"] == [[0, 1], [0, 1]]
    assert described["folder"] == os.getcwd()  # noqa: PTH109 - as text
    environment = described["environment"]
    assert isinstance(environment, dict)
    assert environment["NCCL_DEBUG"] == "WARN"
    assert not {"WANDB_API_KEY", "NCCL_PASSWORD", "TORCH_TOKEN"} & environment.keys()


def test_pdsh_to_all_machines(shown: Callable[..., list[list[str]]]) -> None:
    (line,) = shown("launcher=pdsh", DLTS_HOSTFILE="hosts")
    assert line[:3] == ["PDSH_RCMD_TYPE=ssh", "pdsh", "-S"]
    assert line[line.index("-w") + 1] == "node1,node2"
    assert shlex.split(line[-1])[2:4] == ["--on-node", "%n"]
    assert node_job(line)["hosts"] == ["node1", "node2"]


def test_openmpi(shown: Callable[..., list[list[str]]]) -> None:
    (line,) = shown("hostfile=hosts", "launcher=openmpi", "master_addr=10.0.0.1")
    assert "MASTER_ADDR=10.0.0.1" in line
    assert line[line.index("-n") + 1] == "4"
    assert line[line.index("--host") + 1] == "node1:2,node2:2"
    named = {line[place + 1] for place, word in enumerate(line) if word == "-x"}
    assert {"NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT"} <= named
    assert not {"WANDB_API_KEY", "NCCL_PASSWORD"} & named


@pytest.mark.parametrize(("launcher", "program"), [("mpich", "mpiexec"), ("impi", "mpirun"), ("mvapich", "mpiexec")])
def test_hydra(launcher: str, program: str, shown: Callable[..., list[list[str]]]) -> None:
    (line,) = shown("hostfile=hosts", f"launcher={launcher}")
    options = line[line.index(program) :]
    assert options[1:7] == ["-n", "4", "-ppn", "2", "-hosts", "node1,node2"]
    assert "NCCL_DEBUG" in options[options.index("-genvlist") + 1].split(",")


def test_srun_for_an_allocation_of_its_own(shown: Callable[..., list[list[str]]]) -> None:
    (line,) = shown("deepspeed_slurm=true", "num_nodes=2", "num_gpus=4", "account=mine", "comment='a note'")
    assert "srun" in line
    wanted = {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--account=mine", "--comment=a note"}
    assert wanted <= set(line)
    assert line[line.index("-u") - 1 : line.index("-u") + 3] == [
        *(sys.executable, "-u", str(ROOT / "deepy.py"), str(ROOT / "train.py")),
    ]


def test_an_allocation_is_found_without_a_key(shown: Callable[..., list[list[str]]]) -> None:
    (line,) = shown(**ALLOCATION)
    assert {"srun", "--nodes=2", "--ntasks=2"} <= set(line)
    (line,) = shown("num_gpus=3", "num_nodes=2", "train_batch_size=null", **ALLOCATION)
    assert {"--ntasks=6", "--ntasks-per-node=3"} <= set(line)
    # One of a single task on this machine: deepy.py starts ranks itself.
    lines = shown("num_gpus=2", **(ALLOCATION | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}))
    assert all("srun" not in line for line in lines) and len(lines) == 2


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        (["num_nodes=2"], ConfigError, "num_nodes: 2 machines are asked for, and nothing names them"),
        (["launcher=openmpi", "hostfile=hosts", "include=node1:1"], ConfigError, "mpirun cannot be told which GPUs"),
        (["launcher=mpich", "hostfile=hosts", "exclude=node1:1"], ConfigError, "have [1, 2] slots. Set num_gpus: 1"),
        (["launcher=slurm"], ConfigError, "num_gpus: srun must be told how many ranks"),
        (["hostfile=hosts", "num_gpus=1", "num_nodes=1"], ConfigError, "1 ranks do not divide"),
    ],
)
def test_what_cannot_be_started(
    keys: list[str], kind: type[Exception], words: str, shown: Callable[..., list[list[str]]]
) -> None:
    with pytest.raises(kind) as refused:
        shown(*keys)
    assert words in str(refused.value)


def test_a_launcher_that_is_not_installed(
    shown: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EnvironmentSetupError, match="launcher: slurm: the program srun is not installed here"):
        shown("launcher=slurm", "num_gpus=2")


def test_it_is_deepys_flag(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    import train

    with pytest.raises(SystemExit):
        train.main([str(write_config(TOKENFORMER)), "--dry-run"])
    assert "--dry-run shows what deepy.py would start" in capsys.readouterr().err
