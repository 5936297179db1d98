"""Ranks of this machine, started as a user starts them: they compute what one does, and meet where nobody else can."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER
from tests.helpers.forkserver import ROOT
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, start_ranks, train

TWO = ["num_gpus=2", "model_parallel_size=2"]


def listening(pid: int) -> set[str]:
    """Returns the addresses on which a process and its descendants listen."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            sockets = process.net_connections("inet")
            found |= {str(used.laddr.ip) for used in sockets if used.status == psutil.CONN_LISTEN}
    return found


def assert_loopback(addresses: set[str]) -> None:
    assert addresses
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses


@pytest.mark.full
def test_tensor_parallel_ranks_train_what_one_rank_trains(write_config: Callable[..., Path]) -> None:
    alone, together = (write_config(TOKENFORMER, name, train_iters=4) for name in ("alone", "together"))
    train(alone)
    running = subprocess.Popen(
        [sys.executable, "deepy.py", "train.py", str(together), *TWO],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    addresses: set[str] = set()
    while running.poll() is None:
        addresses |= listening(running.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.2)
    assert running.returncode == 0, running.communicate()[0]
    assert_loopback(addresses)
    one, two = alone.with_suffix(""), together.with_suffix("")
    for key, tolerance in (("train/lm_loss", 1e-6), ("train/grad_norm", 1e-5), ("valid/lm_loss", 1e-6)):
        want = records(one, key)
        assert records(two, key) == pytest.approx(want, abs=tolerance, rel=0)
        assert want
    shares = [file.name for file in (two / "global_step4").glob("layer_01-*")]
    assert sorted(shares) == ["layer_01-model_00-model_states.pt", "layer_01-model_01-model_states.pt"]


@pytest.mark.full
def test_torchrun_trains_what_one_rank_trains(write_config: Callable[..., Path]) -> None:
    alone, together = (write_config(TOKENFORMER, name, train_iters=10) for name in ("alone", "by torchrun"))
    train(alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*torchrun, "train.py", str(together), "pipe_parallel_size=2"],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    want = records(alone.with_suffix(""), "train/lm_loss")
    assert len(want) == 10
    assert records(together.with_suffix(""), "train/lm_loss") == pytest.approx(want, abs=1e-5, rel=0)


def test_a_master_port_that_is_taken_is_named_before_any_rank_starts(write_config: Callable[..., Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finished = run_command(["deepy.py", "train.py", str(write_config(TOKENFORMER)), *TWO, f"master_port={port}"])
    assert finished.returncode == 2
    assert f"master_port: the ranks cannot meet on port {port} of this machine: Address already in use" in (
        finished.stderr
    )
    assert len(finished.stderr.splitlines()) == 1


def set_variables(variables: dict[str, str]) -> None:
    os.environ |= variables


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1", "0.0.0.0"])  # noqa: S104 - only rank 0's own
def test_a_port_of_a_launcher_that_is_taken_is_named(address: str, write_config: Callable[..., Path]) -> None:
    config = write_config(TOKENFORMER, model_parallel_size=2)
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
        finished = run_ranks(config, before=set_variables, arguments=(launcher,))
    assert finished.code == 1
    assert "Traceback" not in finished.output
    assert f"rank 0 cannot meet the others at MASTER_ADDR={address}, MASTER_PORT={port}" in finished.output


def test_one_rank_needs_no_port(write_config: Callable[..., Path]) -> None:
    """Nor does it matter who listens on the one that MASTER_PORT names."""
    config = write_config(TOKENFORMER, train_iters=1000, log_interval=1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {"MASTER_PORT": str(taken.getsockname()[1])}
        running = start_ranks(config, before=set_variables, arguments=(variables,))
        running.wait_for("1/1,000")
        assert_loopback(listening(running.processes[0].pid or 0))
        running.kill()
