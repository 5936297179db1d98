"""Place of a run among its steps, and the step that it has just taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Progress:
    """Counts of what a run has done; the loop and its callbacks keep them up to date."""

    iteration: int = 0
    """Optimizer steps done [steps]."""

    consumed_train_samples: int = 0
    """Training samples read by all ranks together [samples]."""

    consumed_valid_samples: int = 0
    """Validation samples read by all ranks together [samples]."""

    non_finite_steps: int = 0
    """Steps left out or rolled back so far because of NaN or infinity [steps]."""

    training_flops: float = 0.0
    """Floating-point operations of all training so far, of the model before growth too [FLOP]."""


@dataclass(frozen=True)
class Step:
    """One optimizer step that has just been taken."""

    iteration: int
    """Number of the step, counted from 1."""

    losses: Mapping[str, Tensor]
    """Mean losses over the global batch by metric, scalars on this rank's device [nats per token]. The cross entropy
    is `lm_loss`; where other terms come in, `loss` is the whole."""

    learning_rate: float
    """Learning rate that the step used."""

    is_last: bool
    """Whether it is the last of train_iters."""

    ends_run: bool
    """Whether it is the last, or `exit_interval` ends the run with it. Requests to stop come on top of that."""

    grows: bool = False
    """Whether the model grows after it."""

    left_out: bool = False
    """Whether it changed no weight, because of NaN or infinity or while fp16 looks for its scale."""

    metrics: dict[str, float] = field(default_factory=dict)
    """What callbacks measured at this step; those that come later in the list see it."""
