"""The default process group of training and of inference, from first to last collective."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from megatron.errors import EnvironmentSetupError
from megatron.mpu.collective_trace import CollectiveTrace, traced_collectives
from megatron.mpu.context import ParallelContext
from megatron.rank_channel import LISTENER_VARIABLE

DEFAULT_TIMEOUT = timedelta(minutes=10)
"""Time that a collective may take, unless a configuration says otherwise."""
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}
"""Variables, new and old, by which torch remembers so many of NCCL's last operations, for a report on a hang."""

THIS_MACHINE = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1", "::1": "::1"}
"""Values of MASTER_ADDR that mean this machine on each machine -> loopback address. Host names do not, even where they
are looked up as a loopback address: on many machines, their own name is."""
LOOPBACK_INTERFACES = ("lo", "lo0")
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def local_device() -> torch.device:
    """Returns this rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def process_group(timeout: timedelta = DEFAULT_TIMEOUT) -> Iterator[CollectiveTrace]:
    """Makes the default process group of the ranks that the environment announces: NCCL on GPUs, gloo without.

    Yields the trace of its collectives, none of which may take longer than `timeout`; `limit_all_groups` says so to
    groups that are made later. Leaves with a barrier, and in any case with a clean shutdown, without which ranks may
    abort. Raises EnvironmentSetupError when the ranks cannot meet.
    """
    device = local_device()
    if device.type == "cuda":
        for variable, entries in FLIGHT_RECORDER.items():
            os.environ.setdefault(variable, entries)
    # As DeepSpeed does: NCCL is bound to its device at once. A single rank has no peer to reach.
    bound = device.type == "cuda" and int(os.environ["WORLD_SIZE"]) > 1
    with ranks_can_meet():
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=device if bound else None,
            **meeting_point(timeout),
        )
    try:
        with traced_collectives() as trace:
            yield trace
            distributed.barrier()
    finally:
        distributed.destroy_process_group()


def limit_all_groups(timeout: timedelta) -> None:
    """Lets collectives of every group that exists take no longer than `timeout`.

    A new group has torch's own limit, 30 minutes for gloo, whatever the default group has.
    """
    for group in list(distributed.distributed_c10d._world.pg_map):
        distributed.distributed_c10d._set_pg_timeout(timeout, group)


def meeting_point(timeout: timedelta) -> dict[str, Any]:
    """Returns the store in which the ranks meet, with rank and size, as arguments of `init_process_group`.

    One rank needs no port. Ranks of one machine meet on its loopback interface, where no other machine can listen to
    them or speak. Otherwise there is nothing to return: torch reads the environment, as under torchrun.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1 and os.environ["MASTER_ADDR"] not in THIS_MACHINE:
        return {}
    interface = next((name for _, name in socket.if_nameindex() if name in LOOPBACK_INTERFACES), None)
    for variable in INTERFACE_VARIABLES:
        if interface is not None:
            os.environ.setdefault(variable, interface)
    if size == 1:
        return {"store": HashStore(), "rank": rank, "world_size": size}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return {}
    address, port = THIS_MACHINE[os.environ["MASTER_ADDR"]], int(os.environ["MASTER_PORT"])
    listener = None if rank > 0 else _listener(address, port)
    store = TCPStore(address, port, size, rank == 0, timeout, master_listen_fd=listener)
    return {"store": store, "rank": rank, "world_size": size}


def _listener(address: str, port: int) -> int:
    """Returns the file descriptor of a socket that listens on loopback: the launcher's, or else a new one."""
    inherited = os.environ.pop(LISTENER_VARIABLE, None)
    if inherited is None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family).detach()
    os.set_inheritable(int(inherited), False)
    return int(inherited)


@contextmanager
def ranks_can_meet() -> Iterator[None]:
    """Raises EnvironmentSetupError for what keeps the ranks from meeting, such as a port that is taken."""
    try:
        yield
    except (OSError, distributed.DistNetworkError, distributed.DistStoreError) as error:
        raise EnvironmentSetupError(
            f"rank {os.environ['RANK']} cannot meet the others at MASTER_ADDR={os.environ['MASTER_ADDR']}, "
            f"MASTER_PORT={os.environ['MASTER_PORT']}: {str(error).splitlines()[0]}. Name the machine of rank 0, which "
            "the others must reach, and a port on which nothing listens there."
        ) from error


@contextmanager
def inference_context(tensor_parallel_size: int) -> Iterator[ParallelContext]:
    """Yields the context of tensor- and data-parallel ranks of one pipeline stage, on the ranks of the environment.

    One rank alone needs no process group. Raises ConfigError when the tensor-parallel size does not divide the ranks.
    """
    if os.environ["WORLD_SIZE"] == "1" and tensor_parallel_size == 1:
        yield ParallelContext.single()
        return
    with process_group():
        yield ParallelContext.create(tensor_parallel_size, pipe=1)
