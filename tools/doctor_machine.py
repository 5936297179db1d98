"""Findings about one machine: packages, devices, compilers, fast paths, disk and memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
Kind = Literal["ok", "absent", "wrong"]

WRITTEN_BYTES = 64 << 20
"""Size of the file that is written to measure a disk."""
LEAST_SHARED_MEMORY = 1 << 30
"""Shared memory below which loader workers or NCCL may fail [bytes]."""
LEAST_OPEN_FILES = 4096
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - no file is made there


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    kind: Kind
    """ok; absent, which costs speed or a feature; or wrong, which keeps runs from working."""
    text: str
    remedy: str = ""


def machine_findings(folder: Path) -> list[Finding]:
    """Returns all findings about this machine; `folder` is where runs are to be saved."""
    checks = (_versions, _devices, _compilers, _fast_paths)
    return [*(found for check in checks for found in check()), *_disk(folder), *_memory()]


def _versions() -> Iterator[Finding]:
    from megatron.errors import EnvironmentSetupError
    from megatron.training.stability.deepspeed_version import refuse_known_faults

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = [re.split(r"[^\w.-]", name)[0] for name in project["dependencies"]]
    lines = (ROOT / "requirements" / "constraints.txt").read_text("utf-8").splitlines()
    pins = {name.lower().replace("_", "-"): pin for name, _, pin in (line.partition("==") for line in lines) if pin}
    install = "pip install -e . -c requirements/constraints.txt"
    others, found = [], {}
    for name in needed:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            yield Finding("versions", "wrong", f"{name} is not installed", install)
            continue
        pin = pins.get(name.lower(), found[name])
        if found[name].split("+")[0] != pin:
            others.append(f"{name} {found[name]} (tested: {pin})")
    shown = ", ".join(f"{name} {found[name]}" for name in ("torch", "deepspeed", "numpy") if name in found)
    yield Finding("versions", "ok", f"Python {platform.python_version()}, {shown}")
    if others:
        yield Finding("versions", "absent", f"not the tested set: {', '.join(others)}", install)
    try:
        refuse_known_faults(stages=2)
    except EnvironmentSetupError as error:
        yield Finding("versions", "wrong", str(error))


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists():
            yield Finding(
                "devices",
                "wrong",
                f"this machine has NVIDIA's driver, and torch {torch.__version__} sees no GPU",
                "pip install torch with CUDA, or look at CUDA_VISIBLE_DEVICES and the container's --gpus or --nv",
            )
        else:
            yield Finding(
                "devices", "absent", f"no GPU: gloo, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
            )
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("devices", "ok", f"backend nccl {nccl}, CUDA {torch.version.cuda}")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield Finding("devices", "ok", f"GPU {number}: {device.name}, {memory}, sm_{device.major}{device.minor}")
    if not torch.cuda.is_bf16_supported():
        yield Finding("devices", "absent", "no bfloat16 on this GPU", "train in fp16, or in fp32")


def _compilers() -> Iterator[Finding]:
    uses = {
        os.environ.get("CC", "cc"): "Triton's launchers need it on a GPU",
        os.environ.get("CXX", "g++"): "torch_compile needs it on a CPU",
        "nvcc": "building flash-attn or apex needs it",
    }
    for command, use in uses.items():
        path = shutil.which(command)
        if path is None:
            remedy = (
                "apt-get install gcc g++" if command != "nvcc" else "install the CUDA toolkit of torch's CUDA version"
            )
            yield Finding("compilers", "absent", f"no {command}; {use}", remedy)
        else:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
            lines = [line for line in answer.splitlines() if "release" in line] or answer.splitlines() or ["?"]
            yield Finding("compilers", "ok", f"{command}: {lines[0].strip()}")


def _fast_paths() -> Iterator[Finding]:
    import torch

    from megatron.config.optimizer import facts_of
    from megatron.config.optimizers.adamw import AdamWConfig
    from megatron.config.sections.speedups import SpeedupsConfig
    from megatron.kernels.backends import Candidate, Machine, choose
    from megatron.model.speedups import SLOTS
    from megatron.registry import is_installed

    machine = Machine(on_gpu=torch.cuda.is_available(), dtype="bf16")
    implementations = facts_of(AdamWConfig(lr=1e-3)).implementations.items()
    paths: dict[str, list[Candidate]] = {
        slot.operation.kind: [slot.operation[name] for name in slot.operation] for slot in SLOTS
    }
    paths["optimizer"] = [
        Candidate(label=name, rank=rank, key=one.switch, package=one.package, gpu=one.gpu)
        for rank, (name, one) in enumerate(implementations)
    ]
    for operation, candidates in paths.items():
        chosen = choose(candidates, SpeedupsConfig(), machine)
        yield Finding("fast paths", "ok", f"{operation}: {chosen.label}")
        for faster in candidates:
            obstacle = faster.obstacle(machine)
            better = faster.rank is not None and faster.rank > (chosen.rank or 0)
            if better and obstacle is not None and (machine.on_gpu or faster.gpu == "irrelevant"):
                reason, _, remedy = obstacle.partition(". ")
                remedy = remedy.partition(", or set")[0]
                yield Finding("fast paths", "absent", f"{operation}: {faster.label}: {reason}", remedy)
    if machine.on_gpu and not is_installed("triton"):
        yield Finding(
            "fast paths", "absent", "torch_compile: the package 'triton' is not installed", "pip install triton"
        )


def _disk(folder: Path) -> Iterator[Finding]:
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())
    usage = shutil.disk_usage(existing)
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor.") as temporary:
            file = Path(temporary) / "file"
            begin = time.perf_counter()
            with file.open("wb") as opened:
                opened.write(os.urandom(1 << 20) * (WRITTEN_BYTES >> 20))
                os.fsync(opened.fileno())
            speed = WRITTEN_BYTES / (time.perf_counter() - begin)
            yield Finding("disk", "ok", f"{existing}: {usage.free / 2**30:.0f} GiB free, writes {speed / 1e6:.0f} MB/s")
            try:
                os.link(file, file.with_name("link"))
            except OSError:
                text = f"{existing} has no hard links: uploads and growth copy what they would link"
                yield Finding("disk", "absent", text)
    except OSError as error:
        yield Finding("disk", "wrong", f"{existing} cannot be written: {error.strerror}", "name another --folder")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", "ok", f"{total / 2**30:.0f} GiB in this machine")
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        text = f"{SHARED_MEMORY} has {free / 2**30:.2f} GiB free"
        if free < LEAST_SHARED_MEMORY:
            remedy = "docker run --shm-size=8g, or --ipc=host; without, num_workers: 0 and NCCL_SHM_DISABLE=1"
            yield Finding("memory", "wrong", text, remedy)
        else:
            yield Finding("memory", "ok", text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < LEAST_OPEN_FILES:
        yield Finding("memory", "absent", f"a process may open {soft} files", f"ulimit -n {min(hard, 65536)}")
