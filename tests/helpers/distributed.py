"""Runs test functions on several gloo ranks, in pools of worker processes that live as long as the test session.

A pool whose function fails, dies or hangs is killed, since its ranks may be waiting for each other; the next call
starts a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.helpers.forkserver import CONTEXT, ENVIRONMENT

HOST = "127.0.0.1"


class RankFailedError(AssertionError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks with an initialized gloo default group; the results, by rank.

    `fn` is a module-level function of a test module; it, its arguments and its results are pickled. Workers run on
    the CPU with one thread each and DeepSpeed's environment set (RANK, LOCAL_RANK, ...); they keep DeepSpeed from
    compiling its shared-memory collectives. `timeout` is in seconds. Raises RankFailedError for the first rank that
    fails.
    """
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
    try:
        return _pools[world_size].call(fn, args, timeout)
    except BaseException:
        _pools.pop(world_size).kill()
        raise


def run_on_new_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """`run_distributed` on ranks that end with the call.

    For what leaves groups behind, as DeepSpeed's engine does: each has threads of its own.
    """
    pool = _Pool(world_size)
    try:
        results = pool.call(fn, args, timeout)
    except BaseException:
        pool.kill()
        raise
    pool.close()
    return results


class _Pool:
    def __init__(self, world_size: int) -> None:
        # The parent owns the rendezvous, on a port that the system picks, so no two pools can collide.
        self.store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_work, args=(theirs, rank, world_size, self.store.port), daemon=True)
            with mock.patch.dict(os.environ, ENVIRONMENT):
                process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        task = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send(task)
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        results: list[Any] = [None] * len(self.connections)
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailedError(f"ranks {sorted(waiting.values())} did not finish in {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    failure, payload = connection.recv()
                except EOFError:
                    self.processes[rank].join(5)
                    raise RankFailedError(f"rank {rank} died, exit code {self.processes[rank].exitcode}") from None
                if failure:
                    raise RankFailedError(f"rank {rank} failed:\n{failure}")
                results[rank] = pickle.loads(payload)  # noqa: S301 - from our own worker
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for connection in self.connections:
            connection.close()

    def close(self) -> None:
        """Let the workers leave their group in order; kill those that do not."""
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):
                connection.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()


def _work(connection: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(port),
    )
    import deepspeed  # noqa: F401 - so that the module below exists
    import torch

    torch.set_num_threads(1)
    # Its shared-memory collectives need a compiler and half a minute; gloo does without them. The module is looked up
    # by its full name, for the attribute `torch` of deepspeed.comm is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    store = dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    groups = _record_new_groups()
    while (task := connection.recv()) is not None:
        try:
            _leave(groups)
            fn, args = pickle.loads(task)  # noqa: S301 - from our own parent
            reply = ("", pickle.dumps(fn(*args)))
        except BaseException:  # noqa: BLE001 - whatever fails on a rank is told to the parent
            reply = (traceback.format_exc(), b"")
        connection.send(reply)
    dist.barrier()
    dist.destroy_process_group()


def _leave(groups: list[dist.ProcessGroup]) -> None:
    """Destroys groups that the function before has made, while no rank uses any.

    A group's threads wake every ten milliseconds, and after some hundred functions they would fill a core.
    """
    dist.barrier()
    while groups:
        with contextlib.suppress(ValueError):  # The function has destroyed it.
            dist.destroy_process_group(groups.pop())
    gc.collect()
    dist.barrier()


def _record_new_groups() -> list[dist.ProcessGroup]:
    """Returns a list to which each group is added that `torch.distributed.new_group` makes with this rank in it."""
    groups: list[dist.ProcessGroup] = []
    new_group = dist.new_group

    def recorded(*args: Any, **kwargs: Any) -> Any:
        group = new_group(*args, **kwargs)
        if isinstance(group, dist.ProcessGroup):
            groups.append(group)
        return group

    dist.new_group = recorded
    return groups


_pools: dict[int, _Pool] = {}


@atexit.register
def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()
