"""What goes wrong from outside: kills, signals, NaN, full disks. Given to `start_ranks` as `before`, on every rank."""

from __future__ import annotations

import io
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WATCHED_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def this_rank() -> int:
    return int(os.environ["RANK"])


def kill_all_ranks() -> None:
    os.killpg(0, signal.SIGKILL)


def at_step(step: int, action: Callable[[], None]) -> None:
    """Call `action` when the run begins its step number `step`, counted from 1 in this process."""
    from megatron.training import loop

    original, calls = loop.seed_dropout, iter(range(1, sys.maxsize))

    def counted(*arguments: Any) -> None:
        if next(calls) == step:
            action()
        original(*arguments)

    loop.seed_dropout = counted


def watch_save(iteration: int, log: Path | None, kill_at: int | None) -> None:
    """While the checkpoint of `iteration` is saved, write what rank 0 does to files in the run's folder to `log`, one
    line each; or kill all ranks when it is about to do the thing number `kill_at`, counted from 0."""
    if this_rank() != 0:
        return
    folder = ""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal folder, count
        if event not in WATCHED_EVENTS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if not path.startswith("/") and isinstance(arguments[-1], int) and arguments[-1] >= 0:
            # shutil.rmtree names what it deletes by the open folder that it lies in.
            path = str(Path(f"/proc/self/fd/{arguments[-1]}").readlink() / path)
        if event == "os.mkdir" and path.endswith(".writing"):
            folder = str(Path(path).parent) if path.endswith(f"/.global_step{iteration}.writing") else ""
        if not folder or not f"{path}/".startswith(f"{folder}/") or path.endswith("metrics.jsonl"):
            return
        if kill_at == count:
            kill_all_ranks()
        count += 1
        if log is not None:
            opened = f" {arguments[1]}" if event == "open" else ""
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{event}{opened} .{path.removeprefix(folder)}\n".encode())
            os.close(descriptor)

    sys.addaudithook(hook)


def before_each_file(fault: Callable[[Any, Path], None]) -> None:
    """Calls `fault` with content and path before a file of a checkpoint is written, in whichever way."""
    from megatron.checkpointing.engine import engine_files

    now, meanwhile = engine_files.write_tensors, engine_files.SharedCopies.write

    def write_now(content: Any, path: Path) -> Any:
        fault(content, path)
        return now(content, path)

    def write_meanwhile(copies: Any, content: Any, path: Path) -> Any:
        fault(content, path)
        return meanwhile(copies, content, path)

    engine_files.write_tensors = write_now
    engine_files.SharedCopies.write = write_meanwhile  # type: ignore[method-assign]


def kill_in_the_middle_of_a_file(iteration: int, rank: int) -> None:
    """Kills all ranks when `rank` has written half of its first large file in the save of `iteration`."""
    import torch

    def fault(content: Any, path: Path) -> None:
        if path.parent.name == f".global_step{iteration}.writing" and this_rank() == rank:
            whole = io.BytesIO()
            torch.save(content, whole)
            if len(whole.getvalue()) > 10_000:
                path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
                kill_all_ranks()

    before_each_file(fault)


def slow_writes(seconds: float, rank: int | None = None) -> None:
    """The thread that has checkpoints written sleeps so long before each file, on all ranks or on one."""

    def fault(content: Any, path: Path) -> None:
        if threading.current_thread() is not threading.main_thread() and rank in (None, this_rank()):
            time.sleep(seconds)

    before_each_file(fault)


def limit_file_size_in_save(iteration: int, rank: int, size: int) -> None:
    """From the save of `iteration` on, no file of `rank` can grow beyond `size` bytes, as on a full disk."""

    def fault(content: Any, path: Path) -> None:
        if path.parent.name == f".global_step{iteration}.writing" and this_rank() == rank:
            for process in (os.getpid(), *writer_processes()):
                resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))

    before_each_file(fault)


def writer_processes() -> list[int]:
    """Returns the processes that write checkpoints for this one."""
    children = "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
    return [int(child) for child in children if b"writer_process.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def limit_file_size(step: int, rank: int, size: int) -> None:
    """From `step` on, no file of `rank` can grow beyond `size` bytes, as on a full disk."""
    if this_rank() == rank:
        at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def signal_at_step(step: int, rank: int, numbers: list[int]) -> None:
    """`rank` gets signals at the beginning of its step number `step`."""
    if this_rank() == rank:
        at_step(step, lambda: [os.kill(os.getpid(), number) for number in numbers] and None)


def signal_in_evaluation(batch: int, rank: int, number: int) -> None:
    """`rank` gets a signal before its evaluation batch `batch`, counted from 1 in this process."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    original, calls = PipelineEngine.eval_batch, iter(range(1, sys.maxsize))

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == batch and this_rank() == rank:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **options)

    PipelineEngine.eval_batch = counted


def hang_at_step(step: int, rank: int) -> None:
    """`rank` never begins its step number `step`, while the others wait for it."""
    if this_rank() == rank:
        at_step(step, lambda: time.sleep(600))


def not_finite(kind: str, steps: list[int], rank: int) -> None:
    """Makes `steps` of `rank`, counted from 1 in this process, not finite.

    "loss": the loss of the second micro batch is NaN, and its gradients are finite; "infinite loss": the same with
    infinity; "gradient": an element of a gradient is NaN, and the losses are finite.
    """
    from deepspeed.runtime.pipe.engine import PipelineEngine

    if this_rank() != rank:
        return
    original = PipelineEngine.train_batch
    step, micro_batch = 0, 0

    def counted(batches: Iterator[Any]) -> Iterator[Any]:
        nonlocal micro_batch
        for number, batch in enumerate(batches):
            micro_batch = number
            yield batch

    def poison(gradient: Any) -> Any:
        if step in steps:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = math.nan
        return gradient

    def spoil(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        def loss(*arguments: Any) -> Any:
            value = loss_fn(*arguments)
            return value + (math.nan if kind == "loss" else math.inf) if step in steps and micro_batch == 1 else value

        return loss

    def train_batch(self: Any, batches: Iterator[Any]) -> Any:
        nonlocal step
        if step == 0 and kind == "gradient":
            next(weight for weight in self.module.parameters() if weight.requires_grad).register_hook(poison)
        elif step == 0:
            self.module.loss_fn = spoil(self.module.loss_fn)
        step += 1
        return original(self, counted(batches))

    PipelineEngine.train_batch = train_batch
