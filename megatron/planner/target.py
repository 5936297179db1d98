"""The machines that a run is planned for: memory of a rank, its rates, and how ranks lie on machines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError
from megatron.planner.calibration import Calibration, find_calibration
from megatron.planner.devices import CPU, device_of, named_device
from megatron.planner.rates import Rates, assumed_cpu_rates, assumed_rates

GIB = 2**30
GPU_RESERVE, CPU_RESERVE = 1.5 * GIB, 0.75 * GIB
"""Memory of a rank that torch's tensors do not account for: CUDA's context and NCCL's buffers on a GPU, the libraries
that are imported on a CPU [bytes]."""
FRAGMENTS = 0.04
"""Share of a GPU's memory that torch's allocator cannot use for the tensor that needs it."""
GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Target:
    """Machines for a plan."""

    name: str
    on_gpu: bool
    memory: float
    """Memory of a rank [bytes]."""
    per_machine: int
    """Ranks of a machine."""
    rates: Rates
    assumptions: tuple[str, ...] = ()
    """What is assumed beside the rates, a line each."""

    @property
    def usable(self) -> float:
        """Returns the memory that tensors of a rank can have [bytes]."""
        if self.on_gpu:
            return self.memory * (1.0 - FRAGMENTS) - GPU_RESERVE
        return self.memory - CPU_RESERVE

    def fits(self, peak: float) -> bool:
        """Tells whether a rank whose tensors take so much has room [bytes]."""
        return peak <= self.usable


def find_target(name: str | None, launch: LaunchConfig, world_size: int | None, dtype: str) -> Target:
    """Returns the machines that `--device NAME` means; without a name, those of this machine's kind.

    What `--calibrate` has measured on such a device comes before what is assumed of it. Raises ConfigError for an
    unknown name.
    """
    if name is None:
        name = _own_gpu() or CPU
    if name.lower() == CPU:
        return _cpu_target(launch, world_size, dtype)
    try:
        device = named_device(name)
    except ConfigError:
        unknown = find_calibration(slug(name), dtype)
        if unknown is None:
            raise
        return _measured_target(unknown, launch)
    measured = find_calibration(device.name, dtype)
    per_machine, assumptions = _gpus(launch)
    rates = assumed_rates(device, dtype) if measured is None else measured.rates(per_machine, device)
    return Target(device.name, True, device.memory_gib * GIB, per_machine, rates, assumptions)


def _measured_target(measured: Calibration, launch: LaunchConfig) -> Target:
    per_machine, assumptions = _gpus(launch)
    rates = measured.rates(per_machine, None)
    return Target(measured.device, True, measured.memory, per_machine, rates, assumptions)


def _gpus(launch: LaunchConfig) -> tuple[int, tuple[str, ...]]:
    """Returns the GPUs of a machine, and what is assumed of each."""
    reserve = (
        f"{GPU_RESERVE / GIB:g} GiB of a GPU for CUDA and NCCL, and {FRAGMENTS:.0%} of its memory lost to fragments"
    )
    if launch.num_gpus:
        return launch.num_gpus, (reserve,)
    return GPUS_OF_A_MACHINE, (f"{GPUS_OF_A_MACHINE} GPUs a machine (num_gpus says otherwise)", reserve)


def _cpu_target(launch: LaunchConfig, world_size: int | None, dtype: str) -> Target:
    per_machine = launch.num_gpus or world_size or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    measured = find_calibration(CPU, dtype)
    rates = assumed_cpu_rates(cores / per_machine) if measured is None else measured.rates(per_machine, None)
    shared = f"{per_machine} ranks share this machine's memory and its {cores} cores"
    reserve = f"{CPU_RESERVE / GIB:g} GiB of a rank for Python and libraries"
    return Target(CPU, False, host_memory() / per_machine, per_machine, rates, (shared, reserve))


def host_memory() -> float:
    """Returns the memory that this machine, or this process's part of it, has in all [bytes]."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            physical = min(physical, float(text))
    return physical


def _own_gpu() -> str | None:
    """Returns the name of this machine's first GPU, as `--device` has it; None where its driver shows none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        question = [program, "--query-gpu=name", "--format=csv,noheader"]
        asked = subprocess.run(question, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    names = asked.stdout.strip().splitlines() if asked.returncode == 0 else []
    if not names:
        return None
    device = device_of(names[0])
    return slug(names[0]) if device is None else device.name


def slug(torch_name: str) -> str:
    """Returns the name on the command line of a device that is not in the table."""
    return re.sub(r"[^a-z0-9]+", "-", torch_name.lower()).strip("-")
