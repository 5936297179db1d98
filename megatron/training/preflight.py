"""Tries, on the ranks of a run, all that it will need, and leaves nothing behind: `train.py CONFIG --preflight`."""

from __future__ import annotations

import math
import platform
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import distributed

from megatron.checkpointing.engine.engine_files import NowhereFiles
from megatron.checkpointing.states import universal_info
from megatron.checkpointing.store.checkpoint import checkpoint_paths
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.errors import CheckpointError, ConfigError, EnvironmentSetupError, UserError, os_errors_as
from megatron.monitor.held_memory import HeldMemory
from megatron.monitor.provenance import device_name
from megatron.mpu.agreement import gather_objects, on_first_rank, rank_and_size
from megatron.mpu.context import ParallelContext
from megatron.mpu.network_speed import all_reduce_speed, wait_for_device
from megatron.mpu.process_group import local_device, process_group
from megatron.planner.devices import CPU, device_of
from megatron.planner.implementation import implementation_of
from megatron.planner.memory import rank_memory
from megatron.planner.plan import Plan, make_plan
from megatron.planner.stages import stages_of
from megatron.planner.target import find_target, host_memory, slug
from megatron.training.build_engine import require_hardware
from megatron.training.pretrain import assemble
from megatron.training.run_start import RunStart, find_start, load_start
from megatron.training.shared_folders import require_shared_save
from megatron.training.stability.deepspeed_patches import join_process_group
from megatron.training.stability.deepspeed_version import compare_unknown, refuse_known_faults
from megatron.training.stop_request import StopRequest
from megatron.training.training_context import TrainingRun

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

GIB = 2**30
MESSAGE = 2**26
"""Bytes that ranks sum to try the network."""
LATE = 1.5
"""Times the predicted memory or time from which a finding is a warning."""
LATE_IMPORTS = 0.5 * GIB
"""Memory of what DeepSpeed imports with its first engine and step, which counts as a CPU rank's own [bytes]."""
MOST_NAMED = 4
"""Ranks that an outcome names one by one."""
STEPS = 2
"""Steps that are taken: the first has no optimizer state yet."""
Kind = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Tried:
    """Outcome of one trial."""

    what: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"  {self.kind:<8} {self.what:<10} {self.text}"


def preflight(config: RunConfig, batch: BatchConfig, run_folder: Path) -> int:
    """Tries everything in the order in which the run will meet it, and prints each outcome on rank 0.

    Returns 1 where something is wrong, which ends the trials that depend on it, else 0. Nothing is written but indices
    of samples, which the run finds then. Raises EnvironmentSetupError where ranks cannot meet, and on ranks other than
    the first what the run would raise there.
    """
    found: list[Tried] = []

    def say(one: Tried) -> None:
        found.append(one)
        if rank_and_size()[0] == 0:
            print(one, flush=True)

    require_hardware(config)
    refuse_known_faults(config.parallel.pipe_parallel_size)
    with process_group(timedelta(minutes=config.watchdog.distributed_timeout_minutes)):
        join_process_group()
        on_first_rank(partial(compare_unknown, config.parallel.pipe_parallel_size))
        say(_network())
        try:
            try_run(config, batch, run_folder, say)
        except UserError as error:
            if rank_and_size()[0] > 0:
                # Rank 0 may wait for this rank for ever: the launcher, which ends all of them, tells the reason.
                raise
            say(Tried("run", "wrong", f"{type(error).__name__}: {error}"))
        wrong = any(one.kind == "wrong" for one in found)
        if rank_and_size()[0] == 0:
            print("something is wrong: the run would not get far" if wrong else "everything that was tried works")
    return int(wrong)


def try_run(config: RunConfig, batch: BatchConfig, run_folder: Path, say: Callable[[Tried], None]) -> None:
    """Tries the run on the ranks of the process group that exists already, and says each outcome. Collective.

    Raises what the run itself would raise.
    """
    sizes = config.parallel
    context = ParallelContext.create(sizes.model_parallel_size, sizes.pipe_parallel_size, sizes.sequence_parallel)
    if rank_and_size()[1] > 1:
        say(_same_machines())
    if config.checkpoint.save is not None:
        try_folder(Path(config.checkpoint.save))
        say(Tried("save", "ok", f"every rank can write to {config.checkpoint.save}"))
    else:
        say(Tried("save", "warning", "`save` is not set: what the run learns is lost at its end"))
    start = find_start(config)
    say(Tried("start", "ok", str(start)))
    held = HeldMemory()
    run = assemble(config, batch, context, run_folder, start, StopRequest())
    say(_data(run))
    plan = _plan(run)
    say(_disk(run.config, plan))
    load_start(start, run.engine, run.config, run.parallel, run.vocab)
    say(_steps(run, start, plan))
    say(_memory(run, held))
    say(_save(run, plan))


def try_folder(folder: Path) -> None:
    """Raises CheckpointError, on all ranks, unless all of them can write to `folder`. Collective.

    Folders that are made for it are removed again.
    """
    folder = folder.resolve()

    def make() -> list[Path]:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".preflight"
        probe.write_bytes(b"\0")
        probe.unlink()
        return missing

    def remove(made: list[Path]) -> None:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    with os_errors_as(CheckpointError, f"save: {folder}"):
        made = on_first_rank(make)
        try:
            require_shared_save(folder)
        finally:
            on_first_rank(partial(remove, made))


def named_rank(rank: int, host: str) -> str:
    """Returns a rank's name in an outcome."""
    return f"rank {rank} ({host})"


def odd_ranks(facts: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Says in which of their facts ranks differ from most of them; `facts` are each rank's host and values by name."""
    found = []
    for name in facts[0][1]:
        values = [own[name] for _, own in facts]
        # Of as many on both sides, rank 0's.
        usual = max(dict.fromkeys(values), key=values.count)
        odd: dict[str, list[str]] = {}
        for rank, (host, own) in enumerate(facts):
            if own[name] != usual:
                odd.setdefault(own[name], []).append(named_rank(rank, host))
        found += [f"{name} is {value} on {listed(ranks)}, and {usual} on the others" for value, ranks in odd.items()]
    return found


def listed(ranks: Sequence[str]) -> str:
    """Lists ranks by name, a few of them."""
    return ", ".join(ranks[:MOST_NAMED]) + (f" and {len(ranks) - MOST_NAMED} more" * (len(ranks) > MOST_NAMED))


def _same_machines() -> Tried:
    """Compares what ranks compute with: one that differs is slower, or fails where the others do not."""
    own = {
        "device": device_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "memory": f"{_total_memory() / GIB:,.0f} GiB",
    }
    facts = gather_objects((socket.gethostname(), own))
    odd = odd_ranks(facts)
    if odd:
        return Tried("machines", "warning", "; ".join(odd))
    return Tried("machines", "ok", f"all ranks have {', '.join(f'{name} {value}' for name, value in own.items())}")


def _total_memory() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(local_device()).total_memory)
    return host_memory()


def _network() -> Tried:
    rank, size = rank_and_size()
    hosts = gather_objects(socket.gethostname())
    ranks = f"{size} rank{'s' * (size > 1)} on {len(set(hosts))} machine{'s' * (len(set(hosts)) > 1)}"
    if size == 1:
        return Tried("ranks", "ok", f"{ranks}, {device_name()}")
    values = torch.full((MESSAGE // 4,), float(rank + 1), device=local_device())
    distributed.all_reduce(values)
    right = gather_objects(bool((values == size * (size + 1) / 2).all()))
    if not all(right):
        wrong = right.index(False)
        return Tried("ranks", "wrong", f"an all-reduce is wrong on {named_rank(wrong, hosts[wrong])}")
    speed = all_reduce_speed(values)
    backend = distributed.get_backend()
    rate = f"all-reduce at {speed.bandwidth / 1e9:.2f} GB/s, {speed.latency * 1e6:.0f} us"
    return Tried("ranks", "ok", f"{ranks}, {device_name()}, {backend}: {rate}")


def _data(run: TrainingRun) -> Tried:
    datasets, counts = run.data.datasets, run.data.counts
    parts = [
        f"{name} {len(dataset):,} samples"
        for name, dataset in (("train", datasets.train), ("valid", datasets.valid), ("test", datasets.test))
        if dataset is not None
    ]
    text = f"{', '.join(parts)} of {run.config.model.seq_length:,} tokens; the tokenizer's {run.vocab.actual:,} ids"
    return Tried("data", "ok", f"{text} are in the model's {run.vocab.padded:,} rows; {counts.train:,} samples to read")


def _plan(run: TrainingRun) -> Plan | None:
    """Returns the plan for these ranks; None for a device that the planner does not know."""
    name = device_name()
    known = device_of(name)
    word = CPU if name == CPU else slug(name) if known is None else known.name
    _, size = rank_and_size()
    try:
        target = find_target(word, run.config.launch, size, run.config.training.precision.dtype)
    except ConfigError:
        return None
    return make_plan(run.config, run.batch, size, run.vocab.padded, target)


def _disk(config: RunConfig, plan: Plan | None) -> Tried:
    if config.checkpoint.save is None or plan is None:
        return Tried("disk", "ok", "nothing is to be saved" if plan else "the planner does not know this device")
    disk, folder = plan.disk(), Path(config.checkpoint.save).resolve()

    def look() -> tuple[int, int]:
        there = next(path for path in (folder, *folder.parents) if path.is_dir())
        own = sum(
            file.stat().st_size for _, path in checkpoint_paths(folder) for file in path.rglob("*") if file.is_file()
        )
        return shutil.disk_usage(there).free, own

    with os_errors_as(CheckpointError, f"save: {folder}"):
        free, own = on_first_rank(look)
    needed = max(disk.peak - own, 0.0)
    text = (
        f"{disk.most:,} checkpoints of {disk.each / GIB:,.2f} GiB at a time: {needed / GIB:,.2f} GiB more, "
        f"{free / GIB:,.2f} GiB are free"
    )
    if needed <= free:
        return Tried("disk", "ok", text)
    kind: Kind = "wrong" if disk.each > free else "warning"
    return Tried("disk", kind, f"{text}. Keep fewer (keep_last_n_checkpoints), save less often (checkpoint_factor)")


def _steps(run: TrainingRun, start: RunStart, plan: Plan | None) -> Tried:
    read = run.data.read("train", start.progress.consumed_train_samples)
    batches: object = read if run.distillation is None else run.distillation.attach(read)
    run.after_growth.set_step(start.progress.iteration)
    seconds, loss = [], 0.0
    for _ in range(STEPS):
        wait_for_device()
        begin = time.perf_counter()
        loss = _step(run.engine, batches, plan)
        wait_for_device()
        seconds.append(time.perf_counter() - begin)
    slowest = max(gather_objects(seconds[-1]))
    text = f"forward, backward, reduction and optimizer: {max(gather_objects(seconds[0])):.2f} s, then {slowest:.2f} s"
    text += f"; loss {loss:.4f}"
    if run.guard.step_was_bad or math.isnan(loss):
        return Tried("step", "wrong", f"{text}: not finite")
    if plan is None:
        return Tried("step", "ok", text)
    late = slowest > LATE * plan.step.total and plan.target.on_gpu
    return Tried("step", "warning" if late else "ok", f"{text}; planned {plan.step.total:.2f} s")


def _step(engine: PipelineEngine, batches: object, plan: Plan | None) -> float:
    try:
        return float(engine.train_batch(batches))
    except (torch.OutOfMemoryError, MemoryError) as error:
        rank, _ = rank_and_size()
        planned = "" if plan is None else f" The plan has {plan.largest.peak / GIB:,.2f} GiB for a rank."
        raise EnvironmentSetupError(
            f"{named_rank(rank, socket.gethostname())}: out of memory in a training step.{planned} --plan lists "
            "layouts that take less."
        ) from error


def _memory(run: TrainingRun, held: HeldMemory) -> Tried:
    own = held.peak()
    stage = stages_of(run.config.model, run.config.parallel, run.vocab.padded)[run.parallel.pipe_rank]
    implementation = implementation_of(run.config, on_gpu=torch.cuda.is_available())
    memory = rank_memory(run.config, run.batch, stage, run.vocab.padded, implementation)
    ranks = gather_objects((own, memory.peak, memory.not_returned, socket.gethostname()))
    most = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    measured, planned, freed, host = ranks[most]
    text = f"{named_rank(most, host)} held {measured / GIB:,.2f} GiB at a time"
    text += f"{', most of all' if len(ranks) > 1 else ''}; planned {planned / GIB:,.2f} GiB"
    if torch.cuda.is_available():
        text += f", of {torch.cuda.get_device_properties(local_device()).total_memory / GIB:,.1f} GiB"
    imported = 0.0 if torch.cuda.is_available() else LATE_IMPORTS
    if imported:
        text += f", up to {freed / GIB:,.2f} GiB of freed tensors and {imported / GIB:g} GiB of what a step imports"
    return Tried("memory", "warning" if measured > LATE * planned + freed + imported else "ok", text)


def _save(run: TrainingRun, plan: Plan | None) -> Tried:
    """Saves into nothing, by the engine: what ranks would write, and how long they take without a disk."""
    engine, config = run.engine, run.config
    files = NowhereFiles(copies=config.checkpoint.async_save)
    before, engine.checkpoint_engine = engine.checkpoint_engine, files
    if not hasattr(engine.module, universal_info.KEY):
        setattr(engine.module, universal_info.KEY, universal_info.universal_info(config, run.vocab))
    begin = time.perf_counter()
    try:
        engine.save_checkpoint("nowhere", tag="preflight", save_latest=False)
    finally:
        engine.checkpoint_engine = before
    failure: str | None = None
    try:
        own = sum(entry.size for entry in files.taken().values())
    except CheckpointError as error:
        own, failure = 0, str(error)
    answers = gather_objects((own, time.perf_counter() - begin, failure, socket.gethostname()))
    failures = [f"{named_rank(rank, host)}: {why}" for rank, (_, _, why, host) in enumerate(answers) if why is not None]
    if failures:
        return Tried("files", "wrong", "; ".join(failures))
    total = sum(size for size, *_ in answers)
    planned = "" if plan is None else f"; planned {plan.disk().each / GIB:,.2f} GiB"
    slowest = max(seconds for _, seconds, *_ in answers)
    return Tried("files", "ok", f"a save to nowhere: {total / GIB:,.2f} GiB in {slowest:.1f} s{planned}")
