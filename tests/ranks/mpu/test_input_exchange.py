"""Gradients of inputs travel while those of weights are computed, in linear layers that split their weights."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.config.sections.model import ModelConfig
from megatron.model.layer import TransformerLayer
from megatron.mpu.context import ParallelContext
from megatron.mpu.input_exchange import InputExchange
from megatron.mpu.parameters import initialize_parameters
from tests.helpers.distributed import run_distributed
from tests.helpers.models import tiny_llama, tiny_pythia

BATCH, LENGTH, WIDTH = 2, 16, 32
PRODUCTS = ("aten.mm", "aten.bmm", "aten.addmm")


class Operations(TorchDispatchMode):
    """Lists matrix products, and copies of whole activations, with what else is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith(PRODUCTS):
            self.seen.append("product")
        if name.startswith("aten.clone") and args[0].numel() == BATCH * LENGTH * WIDTH:
            self.seen.append("copy")
        return function(*args, **(kwargs or {}))


def watch(model: ModelConfig, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Returns what happens in a layer's forward and backward pass."""
    context = ParallelContext.create(dist.get_world_size(), 1, sequence_parallel)
    layer = TransformerLayer(model, context, 0)
    initialize_parameters(layer.named_parameters(), 1, context)
    x = torch.randn(BATCH, LENGTH // (2 if sequence_parallel else 1), WIDTH, requires_grad=True)
    begin, end = InputExchange.begin, InputExchange.backward
    backward = Operations()

    def begun(exchange: InputExchange, gradient: torch.Tensor) -> None:
        begin(exchange, gradient)
        backward.seen.append("begin")

    def ended(exchange: InputExchange, gradient: torch.Tensor) -> torch.Tensor:
        backward.seen.append("end")
        return end(exchange, gradient)

    patched = {"begin": begun, "backward": ended}
    with mock.patch.multiple(InputExchange, **patched):
        with Operations() as forward:
            y = layer(x)
        dy = torch.randn_like(y)
        with backward:
            y.backward(dy)
    return forward.seen, backward.seen


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence parallel"])
@pytest.mark.parametrize(
    ("model", "exchanges"),
    [(tiny_pythia(), 2), (tiny_llama(), 2)],
    ids=["gpt_neox", "llama"],
)
def test_weights_are_differentiated_while_the_input_travels(
    model: ModelConfig, exchanges: int, sequence_parallel: bool
) -> None:
    for forward, backward in run_distributed(watch, 2, model, sequence_parallel):
        assert backward.count("begin") == backward.count("end") == exchanges
        since_begin = -1
        for event in backward:
            if event == "begin":
                assert since_begin == -1, "one at a time"
                since_begin = 0
            elif event == "end":
                assert since_begin > 0, "nothing was computed on the way"
                since_begin = -1
            elif since_begin >= 0 and event == "product":
                since_begin += 1
        if not sequence_parallel:
            assert "copy" not in forward, "a sum takes the memory of its summand"
