"""Triton's interpreter, which runs kernels on CPUs: launches one at a time, and counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

from megatron.registry import is_installed


@contextmanager
def one_launch_at_a_time() -> Iterator[None]:
    """Lets threads take turns, where Triton is installed: its interpreter keeps the program's place in a global."""
    if not is_installed("triton"):
        yield
        return
    from triton.runtime import interpreter

    lock, launch = threading.Lock(), interpreter.GridExecutor.__call__

    def alone(executor: Any, *args: object, **options: object) -> object:
        with lock:
            return launch(executor, *args, **options)

    with mock.patch.object(interpreter.GridExecutor, "__call__", alone):
        yield


@dataclass
class Traffic:
    """What kernels did."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts kernels, and the bytes that their programs load and store: elements outside a mask cost nothing."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    traffic, builder = Traffic(), interpreter.InterpreterBuilder
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store

    def counted_launch(executor: Any, *args: object, **options: object) -> object:
        traffic.launches += 1
        with _disable_current_modes():  # the interpreter copies tensors by torch's operations
            return launch(executor, *args, **options)

    def size(pointers: Any, mask: Any) -> int:
        return int(np.count_nonzero(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *more: object) -> object:
        traffic.bytes_read += size(pointers, mask)
        return load(self, pointers, mask, *more)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *more: object) -> object:
        traffic.bytes_written += size(pointers, mask)
        return store(self, pointers, value, mask, *more)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
    ):
        yield traffic


@contextmanager
def bfloat16_rounded_to_nearest() -> Iterator[None]:
    """Rounds float32 to bfloat16 as GPUs do, where Triton is installed; its interpreter cuts the digits off."""
    if not is_installed("triton"):
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        data = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(data, tl.bfloat16)

    # The casts of the interpreter are lambdas that look this one up.
    with mock.patch.object(interpreter.InterpreterBuilder, "cast_impl", rounded):
        yield
