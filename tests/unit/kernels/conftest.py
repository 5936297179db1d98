"""Kernels of Triton in its interpreter, which rounds as GPUs do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.triton_interpreter import bfloat16_rounded_to_nearest


@pytest.fixture(autouse=True)
def rounded_as_on_gpus() -> Iterator[None]:
    with bfloat16_rounded_to_nearest():
        yield
