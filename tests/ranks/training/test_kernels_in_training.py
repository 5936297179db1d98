"""Training with the kernels that a YAML names, through the command line, against a float64 loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize, build_local
from megatron.registry import is_installed
from tests.helpers.configs import PYTHIA, TOKENFORMER, VOCAB_SIZE, layout_keys
from tests.helpers.plain_torch import PlainRun
from tests.helpers.records import records
from tests.helpers.runs import train

FUSED = {"fused_cross_entropy": "on"}
RECOMPUTED = FUSED | {"recompute_scores": True}
TRITON = RECOMPUTED | {"pattention": "triton", "rotary": "triton"}
SHORT = {"num_layers": 1, "seq_length": 4, "max_position_embeddings": 4}
"""Triton's interpreter takes milliseconds for each row."""


def follows_the_float64_loop(
    write_config: Callable[..., Path],
    dataset: Path,
    base: dict[str, Any],
    layout: tuple[int, int, int],
    *,
    relative_norm_error: float = 0.0,
    **keys: Any,
) -> str:
    """Trains, and holds losses and norms of all steps against plain torch's; returns what the run printed."""
    tensor, pipe, data = layout
    steps, batch = keys["train_iters"], keys.pop("batch")
    settings = base | layout_keys(*layout, batch=batch) | keys
    config = write_config(settings)
    printed = train(config, ranks=tensor * pipe * data, timeout=900.0)
    run = load_config([config]).run
    whole = build_local(run.model, VocabSize(VOCAB_SIZE, VOCAB_SIZE), run.training.seed)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    expected = list(PlainRun(settings, batch, steps).follow(weights, dataset))
    losses, norms = (list(records(config.with_suffix(""), f"train/{key}").values()) for key in ("lm_loss", "grad_norm"))
    assert len(losses) == steps
    assert losses == pytest.approx([loss for loss, _ in expected], abs=1e-6, rel=0)
    assert norms == pytest.approx([norm for _, norm in expected], abs=1e-5, rel=relative_norm_error)
    return printed


def test_two_tensor_parallel_ranks_train_through_every_kernel(write_config: Callable[..., Path], dataset: Path) -> None:
    if not is_installed("triton"):
        pytest.skip("the package 'triton' is not installed")
    changes = TRITON | SHORT | {"batch": 1, "train_iters": 3}
    printed = follows_the_float64_loop(write_config, dataset, TOKENFORMER, (2, 1, 1), **changes)
    assert "pattention triton | rotary triton | layer norm torch | head and loss in chunks" in printed


@pytest.mark.full
@pytest.mark.timeout(1200)  # Triton's interpreter
@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)])
def test_thirty_steps_of_every_theta_through_every_kernel(
    write_config: Callable[..., Path], dataset: Path, theta: str, layout: tuple[int, int, int]
) -> None:
    if not is_installed("triton"):
        pytest.skip("the package 'triton' is not installed")
    changes = TRITON | SHORT | {"batch": 1, "train_iters": 30, "norm_activation_type": theta}
    # Its gradients are ten times as long as those of the others, and float32's rounding with them: 3e-5 by plain
    # operations, 2e-5 by these kernels.
    error = 1e-5 if theta == "gelu_l2_norm" else 0.0
    follows_the_float64_loop(write_config, dataset, TOKENFORMER, layout, relative_norm_error=error, **changes)


def test_the_last_stage_trains_a_tied_head_without_its_logits(write_config: Callable[..., Path], dataset: Path) -> None:
    """The embedding's gradient has one part on the first stage, and one on the last."""
    changes = RECOMPUTED | {"batch": 4, "train_iters": 6}
    printed = follows_the_float64_loop(write_config, dataset, TOKENFORMER, (1, 2, 1), **changes)
    assert "pattention eager | rotary eager | layer norm torch | head and loss in chunks" in printed


@pytest.mark.full
@pytest.mark.parametrize("base", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2)])
def test_the_loss_in_chunks_in_every_layout(
    write_config: Callable[..., Path],
    dataset: Path,
    base: dict[str, Any],
    tied: bool,
    layout: tuple[int, int, int],
) -> None:
    changes = FUSED | {"batch": 4, "train_iters": 30, "no_weight_tying": not tied, "eod_mask_loss": layout[0] == 1}
    changes |= {"sequence_parallel": layout[0] > 1}
    follows_the_float64_loop(write_config, dataset, base, layout, **changes)
