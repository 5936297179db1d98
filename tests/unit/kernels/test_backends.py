"""The choice among implementations of one operation."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.config.sections.speedups import SpeedupsConfig
from megatron.errors import EnvironmentSetupError
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.backends import Candidate, Machine, Operation, choose
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM
from megatron.kernels.pattention.pattention import PATTENTION

CPU, GPU = Machine(on_gpu=False, dtype="fp32"), Machine(on_gpu=True, dtype="fp32")
PLAIN = Candidate(label="plain", rank=0)
FAST = Candidate(label="fast", rank=1, key="flash_attention", gpu="required")
SWITCHED_ON = SpeedupsConfig(flash_attention="on")


def chosen(*candidates: Candidate, machine: Machine = GPU, config: SpeedupsConfig | None = None) -> str:
    return choose(candidates, config or SpeedupsConfig(), machine).label


def test_auto_takes_the_highest_rank_that_fits() -> None:
    assert chosen(PLAIN, FAST) == "fast"
    assert chosen(PLAIN, FAST, machine=CPU) == "plain"
    assert chosen(PLAIN, Candidate(label="elsewhere", rank=2, package="no_such_package")) == "plain"
    assert chosen(PLAIN, Candidate(label="half", rank=2, dtypes=("bf16", "fp16"))) == "plain"
    assert chosen(PLAIN, FAST, Candidate(label="always", rank=2)) == "always"


def test_a_reference_is_never_chosen() -> None:
    assert chosen(Candidate(label="reference", rank=None), PLAIN) == "plain"


def test_a_backend_that_prefers_a_gpu_runs_on_a_cpu_when_it_is_on() -> None:
    preferring = Candidate(label="preferring", rank=1, key="torch_fused_adamw", gpu="preferred")
    assert chosen(PLAIN, preferring, machine=CPU) == "plain"
    assert chosen(PLAIN, preferring, machine=CPU, config=SpeedupsConfig(torch_fused_adamw="on")) == "preferring"
    assert chosen(PLAIN, preferring, machine=GPU) == "preferring"


def test_the_key_decides_before_the_rank() -> None:
    assert chosen(PLAIN, FAST, config=SpeedupsConfig(flash_attention="off")) == "plain"
    assert chosen(PLAIN, FAST, Candidate(label="higher", rank=9), config=SWITCHED_ON) == "fast"


def test_one_that_is_on_and_does_not_fit_is_an_error() -> None:
    with pytest.raises(EnvironmentSetupError, match="flash_attention: on: fast needs a GPU"):
        chosen(PLAIN, FAST, machine=CPU, config=SWITCHED_ON)


@pytest.mark.parametrize("operation", [CAUSAL_ATTENTION, LAYER_NORM, PATTENTION], ids=lambda operation: operation.kind)
def test_every_operation_has_a_reference_and_runs_everywhere(operation: Operation[Any]) -> None:
    assert operation["reference"].rank is None
    operation["reference"].load()
    for dtype in ("fp32", "bf16", "fp16"):
        operation.choose(SpeedupsConfig(), Machine(on_gpu=False, dtype=dtype)).load()
