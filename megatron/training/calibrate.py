"""Measures, on the ranks of a run, the rates that plans are made of: `train.py CONFIG --calibrate`."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from megatron.config.sections.run_config import RunConfig
from megatron.monitor.provenance import device_name
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size
from megatron.mpu.network_speed import AllReduceSpeed, all_reduce_speed, wait_for_device
from megatron.mpu.parameters import DTYPES
from megatron.mpu.process_group import local_device, process_group
from megatron.planner.calibration import Calibration, NumberFormat, write_calibration
from megatron.planner.devices import CPU, device_of
from megatron.planner.step_time import ATTENTION_BACKWARD
from megatron.planner.target import host_memory, slug
from megatron.training.build_engine import require_hardware

FORMATS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
"""Number formats in which products and attention are timed."""
PRODUCTS = {
    "cpu": ((128, 128, 512), (512, 256, 1024), (1024, 768, 2304), (2048, 1024, 4096)),
    "cuda": ((2048, 768, 2304), (8192, 768, 3072), (16384, 1536, 6144), (16384, 4096, 16384)),
}
"""Rows, inputs and outputs of the matrix products that are timed."""
TENSORS = {"cpu": (2**18, 2**22, 2**24, 2**26), "cuda": (2**22, 2**26, 2**28)}
"""Tensors over which passes are timed [bytes]."""
ATTENTION = {"cpu": (2, 12, 1024, 64), "cuda": (8, 16, 2048, 64)}
"""Sequences, heads, positions and features of a head for which attention is timed."""
MESSAGE = {"cpu": 2**26, "cuda": 2**28}
"""Tensor that ranks sum [bytes]."""
SECONDS_EACH = 0.6
"""Time for each measurement [s], after which it ends when it was repeated FEWEST_ROUNDS times."""
FEWEST_ROUNDS, MOST_ROUNDS = 3, 25


def calibrate(config: RunConfig) -> str:
    """Measures this rank's device and its network, while all ranks do, and writes what the slowest has.

    Returns the report, on every rank. Raises EnvironmentSetupError where the device does not have the run's number
    format, or the file cannot be written.
    """
    require_hardware(config)
    with process_group():
        hosts = gather_objects(socket.gethostname())
        load = os.getloadavg()[0]
        distributed.barrier()
        passes = passes_curve()
        functions = functions_rate(passes)
        formats = {
            name: NumberFormat(products_curve(DTYPES[name]), attention_rate(DTYPES[name]))
            for name in FORMATS[local_device().type]
        }
        link, network = _network(hosts)
        rank, _ = rank_and_size()
        own = Calibration(
            device=_device_word(),
            host=hosts[0],
            date=datetime.now(UTC).date().isoformat(),
            ranks=hosts.count(hosts[rank]),
            memory=_device_memory(),
            formats=formats,
            passes=passes,
            functions=functions,
            link=None if link is None else link.bus,
            network=None if network is None else network.bus / hosts.count(hosts[rank]),
            latency=max((one.latency for one in (link, network) if one is not None), default=None),
            load=load,
        )
        slowest = _slowest(gather_objects(own))
        file = on_first_rank(lambda: str(write_calibration(slowest)))
    return calibration_text(slowest, file)


def calibration_text(measured: Calibration, file: str) -> str:
    """Returns the report of what was measured."""
    lines = [f"{measured.device} on {measured.host}: {measured.ranks} ranks at a time, load {measured.load:.1f} before"]
    for name, found in measured.formats.items():
        for size, rate in found.products:
            lines.append(f"  {name} products of {size / 1e9:,.2f} GFLOP: {rate / 1e9:,.0f} GFLOP/s")
        lines.append(f"  {name} attention: {found.attention / 1e9:,.0f} GFLOP/s")
    lines += [
        *(f"  passes over {size / 2**20:,.2f} MiB: {rate / 1e9:,.1f} GB/s" for size, rate in measured.passes),
        f"  GeLUs: {measured.functions / 1e6:,.0f} million/s",
    ]
    for name, speed in (("in a machine", measured.link), ("between machines, a rank", measured.network)):
        if speed is not None:
            lines.append(f"  collectives {name}: {speed / 1e9:,.2f} GB/s")
    if measured.latency is not None:
        lines.append(f"  the smallest collective: {measured.latency * 1e6:,.0f} us")
    return "\n".join([*lines, f"kept in {file}; --plan --device {measured.device} takes them from there"])


def products_curve(dtype: torch.dtype) -> list[list[float]]:
    """Times a product with weights and both products of its backward pass, by size [FLOP, FLOP/s]."""
    device, points = local_device(), []
    for rows, inputs, outputs in PRODUCTS[device.type]:
        x_RD = torch.randn(rows, inputs, device=device).to(dtype)
        weight_ND = torch.randn(outputs, inputs, device=device).to(dtype)
        dy_RN = torch.randn(rows, outputs, device=device).to(dtype)

        def three(x: Tensor = x_RD, weight: Tensor = weight_ND, dy: Tensor = dy_RN) -> None:
            x @ weight.T
            dy @ weight
            dy.T @ x

        flops = 2.0 * rows * inputs * outputs
        points.append([flops, 3 * flops / _seconds(three)])
    return sorted(points)


def attention_rate(dtype: torch.dtype) -> float:
    """Times fused causal attention forward and backward, counted over the pairs that are not masked [FLOP/s]."""
    device = local_device()
    batch, heads, length, features = ATTENTION[device.type]
    shape = (batch, length, heads, features)
    q, k, v = (torch.randn(shape, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    gradient = torch.randn(shape, device=device).to(dtype).transpose(1, 2)

    def both() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), gradient)

    forward = 2.0 * heads * features * (length + 1) * batch * length
    return (1 + ATTENTION_BACKWARD) * forward / _seconds(both)


def passes_curve() -> list[list[float]]:
    """Times a plain operation into fresh memory, by the size of its tensor [bytes, bytes/s]."""
    device, points = local_device(), []
    for size in TENSORS[device.type]:
        values = torch.randn(size // 4, device=device)
        points.append([float(size), 2.0 * size / _seconds(partial(torch.mul, values, 1.5))])
    return points


def functions_rate(passes: list[list[float]]) -> float:
    """Times GeLU and its gradient beyond their passes [1/s]."""
    device = local_device()
    size = TENSORS[device.type][1]
    rate = next(rate for bytes_of_one, rate in passes if bytes_of_one == size)
    values = torch.randn(size // 4, device=device)

    def both() -> None:
        F.gelu(values)
        torch.ops.aten.gelu_backward(values, values)

    beyond = _seconds(both) - 5.0 * size / rate
    return 2 * values.numel() / max(beyond, 1e-12 * values.numel())


def _seconds(work: Callable[[], object]) -> float:
    """Returns the median time of `work`, after a first one that does not count [s]."""
    clock, times = work_clock(), []
    for _ in range(MOST_ROUNDS + 1):
        wait_for_device()
        begin = clock()
        work()
        wait_for_device()
        times.append(clock() - begin)
        if sum(times) > SECONDS_EACH and len(times) > FEWEST_ROUNDS:
            break
    return max(statistics.median(times[1:]), 1e-9)


def work_clock() -> Callable[[], float]:
    """Returns the clock by which a rank's work is timed.

    On a CPU it is the processor time of a rank of one thread, which other programs on the machine do not prolong.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def _network(hosts: list[str]) -> tuple[AllReduceSpeed | None, AllReduceSpeed | None]:
    """Measures collectives among the ranks of this machine, and among all where there are several machines."""
    device = local_device()
    rank, size = rank_and_size()
    values = torch.ones(MESSAGE[device.type] // 4, device=device)
    groups = {host: [other for other, where in enumerate(hosts) if where == host] for host in dict.fromkeys(hosts)}
    made = {host: distributed.new_group(members) for host, members in groups.items()}
    link = all_reduce_speed(values, made[hosts[rank]]) if len(groups[hosts[rank]]) > 1 else None
    distributed.barrier()
    return link, all_reduce_speed(values) if len(groups) > 1 and size > 1 else None


def _slowest(measured: list[Calibration]) -> Calibration:
    """Returns the rates of the slowest rank in each, for whom the others wait."""
    first = measured[0]
    formats = {name: [one.formats[name] for one in measured] for name in first.formats}
    return Calibration(
        device=first.device,
        host=first.host,
        date=first.date,
        ranks=min(one.ranks for one in measured),
        memory=min(one.memory for one in measured),
        formats={
            name: NumberFormat(_slowest_curve(one.products for one in found), min(one.attention for one in found))
            for name, found in formats.items()
        },
        passes=_slowest_curve(one.passes for one in measured),
        functions=min(one.functions for one in measured),
        link=min((one.link for one in measured if one.link is not None), default=None),
        network=min((one.network for one in measured if one.network is not None), default=None),
        latency=max((one.latency for one in measured if one.latency is not None), default=None),
        load=first.load,
    )


def _slowest_curve(curves: Iterator[list[list[float]]]) -> list[list[float]]:
    return [[points[0][0], min(rate for _, rate in points)] for points in zip(*curves, strict=True)]


def _device_word() -> str:
    if not torch.cuda.is_available():
        return CPU
    device = device_of(device_name())
    return slug(device_name()) if device is None else device.name


def _device_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(local_device()).total_memory)
    return host_memory()
