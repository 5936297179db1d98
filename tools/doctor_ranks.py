"""Communication among the ranks that a launcher has started: whether it is right, and how fast it is."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, distributed

from megatron.mpu.agreement import gather_objects, rank_and_size
from megatron.mpu.network_speed import all_reduce_speed, median_seconds
from megatron.mpu.process_group import local_device
from tools.doctor_machine import Finding

SMALL, LARGE = 4, 64 << 20
"""Bytes that are sent to measure latency, and bandwidth."""


def rank_findings(host: str) -> list[Finding]:
    """Measures an all-reduce and a transfer from each rank to the next; returns the findings. Collective."""
    rank, size = rank_and_size()
    hosts = gather_objects(host)
    machines = len(set(hosts))
    backend = distributed.get_backend()
    found = [Finding("ranks", "ok", f"{size} ranks on {machines} machine{'s' * (machines > 1)}, backend {backend}")]
    if size == 1:
        remedy = "torchrun --nproc-per-node N tools/doctor.py, srun or mpirun do the same with several"
        return [*found, Finding("ranks", "absent", "one rank alone has nobody to talk to", remedy)]
    return [*found, *_all_reduce(rank, size), *_transfers(rank, size, hosts)]


def _all_reduce(rank: int, size: int) -> list[Finding]:
    values = torch.full((LARGE // 4,), float(rank + 1), device=local_device())
    distributed.all_reduce(values)
    expected = size * (size + 1) / 2
    right = gather_objects(bool((values == expected).all()))
    if not all(right):
        return [Finding("ranks", "wrong", f"an all-reduce is wrong on rank {right.index(False)}", "do not train here")]
    speed = all_reduce_speed(values)
    text = f"all-reduce of {LARGE >> 20} MiB: {speed.bandwidth / 1e9:.2f} GB/s, bus {speed.bus / 1e9:.2f} GB/s"
    return [Finding("ranks", "ok", f"{text}; of {SMALL} bytes: {speed.latency * 1e6:.0f} us")]


def _transfers(rank: int, size: int, hosts: list[str]) -> list[Finding]:
    """Sends from each rank to the next, one pair after the other, so that none shares its path."""
    device = local_device()
    measured: list[tuple[float, float, int]] = []
    for source in range(size if size > 2 else 1):
        target = (source + 1) % size
        own: tuple[float, float] | None = None
        if rank in (source, target):
            values = torch.full((LARGE // 4,), float(source + 1 if rank == source else 0), device=device)
            own = _there_and_back(values, rank == source, target if rank == source else source)
            if rank == target and not bool((values == source + 1).all()):
                own = None
        results = gather_objects(own)
        sent = results[source]
        if sent is None or results[target] is None:
            return [Finding("ranks", "wrong", f"what rank {source} sends to rank {target} arrives changed")]
        measured.append((*sent, source))
    slowest = min(measured)
    median = statistics.median(bandwidth for bandwidth, _, _ in measured)
    latency = statistics.median(latency for _, latency, _ in measured)
    source, target = slowest[2], (slowest[2] + 1) % size
    pair = f"rank {source} ({hosts[source]}) to rank {target} ({hosts[target]})"
    text = (
        f"point-to-point: {median / 1e9:.2f} GB/s, {latency * 1e6:.0f} us; slowest: {pair}, {slowest[0] / 1e9:.2f} GB/s"
    )
    return [Finding("ranks", "ok", text)]


def _there_and_back(values: Tensor, begins: bool, peer: int) -> tuple[float, float]:
    """Returns bandwidth [bytes/s] and latency [s] of one way."""

    def exchange(part: Tensor) -> None:
        for sends in (begins, not begins):
            (distributed.send if sends else distributed.recv)(part, peer)

    exchange(values)
    large, small = median_seconds(lambda: exchange(values)), median_seconds(lambda: exchange(values[:1]))
    return values.numel() * values.element_size() / (large / 2), small / 2
