"""What a rank sees of its own stack: whether it compiles, and where it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.training.hangs.rank_state import describe_frame, is_compiling


@pytest.mark.full
def test_a_compilation_is_told_from_the_run_of_what_it_made() -> None:
    seen: dict[str, bool] = {}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen["while it compiles"] = is_compiling(sys._getframe())

        def run(*arguments: Any) -> Any:
            seen["while it runs"] = is_compiling(sys._getframe())
            return graph.forward(*arguments)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.sin() + 1, backend=backend)
    assert torch.equal(compiled(torch.zeros(3)), torch.ones(3))
    assert seen == {"while it compiles": True, "while it runs": False}


def test_a_place_has_file_line_and_function() -> None:
    assert describe_frame(sys._getframe()).startswith("training/hangs/test_rank_state.py:")
    assert describe_frame(sys._getframe()).endswith(" in test_a_place_has_file_line_and_function")
    assert describe_frame(None) == "nowhere"
