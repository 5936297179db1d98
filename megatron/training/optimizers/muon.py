"""Muon on the flat partitions of ZeRO-1, with AdamW for what is no hidden matrix.

    M <- mu M + (1 - mu) G        U = (1 - mu) G + mu M   (Nesterov; else U = M)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) NS(U)

NS is the quintic Newton-Schulz iteration of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with their
coefficients: it takes all singular values of U near 1. The factor gives a step the size of AdamW's (Liu et al. 2025,
arXiv:2502.16982, section 2.2). DeepSpeed's own Muon orthogonalizes gradients before they are clipped, and refuses bf16
in pipelines; this one is given gradients that are reduced and clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.checkpointing.engine.flat_partitions import Fragment
from megatron.mpu.context import ParallelContext, stage_group
from megatron.mpu.parameters import DTYPES
from megatron.training.optimizers.adamw import CacheBlockedAdamW
from megatron.training.optimizers.whole_matrices import WholeMatrices

A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-7
SIZE_OF_ADAMS_STEP = 0.2
"""Root mean square of AdamW's updates in training, to which Muon's are scaled."""
MOMENTUM = "momentum_buffer"


class OrthogonalizedMomentum(torch.optim.Optimizer):
    """Muon for groups that are `orthogonalized`, AdamW for the others.

    Its name is not Muon's: DeepSpeed would orthogonalize the gradients of an optimizer of that name once more.
    """

    def __init__(
        self,
        groups: Any,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        ns_dtype: str,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
    ) -> None:
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        self._adamw = CacheBlockedAdamW([torch.zeros(0)], lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__(groups, self._adamw.defaults | own)
        self._matrices: WholeMatrices | None = None

    def use_partitions(self, groups: Sequence[Sequence[Fragment]], context: ParallelContext) -> None:
        """Takes the places of matrices in this rank's partitions. Collective over all ranks, before the first step."""
        stage = stage_group(context)
        for group, fragments in zip(self.param_groups, groups, strict=True):
            if group["orthogonalized"]:
                self._matrices = WholeMatrices(fragments, context, stage)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes a step of the flat partitions, by their gradients. Collective over the stage."""
        for group in self.param_groups:
            if group["orthogonalized"]:
                self._step_matrices(group)
        others = [group for group in self.param_groups if not group["orthogonalized"]]
        if others:
            # Hooks of this optimizer run once for a step: the other one has none.
            self._adamw.param_groups, self._adamw.state = others, self.state
            self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        (flat,) = group["params"]
        state, momentum = self.state[flat], group["momentum"]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat)
        average = state[MOMENTUM].lerp_(flat.grad, 1.0 - momentum)
        update = flat.grad.lerp(average, momentum) if group["nesterov"] else average.clone()
        if self._matrices is None:
            raise RuntimeError("the optimizer steps before it knows its partitions")
        steps, dtype = group["ns_steps"], DTYPES[group["ns_dtype"]]
        self._matrices.change(update, lambda matrix: scaled_orthogonal(matrix, steps, dtype))
        flat.mul_(1.0 - group["lr"] * group["weight_decay"])
        flat.add_(update, alpha=-group["lr"])


def scaled_orthogonal(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Returns the update of a matrix [rows, columns] before its learning rate, in the matrix's format."""
    factor = SIZE_OF_ADAMS_STEP * math.sqrt(max(matrix.shape))
    return newton_schulz(matrix.to(dtype), steps).to(matrix.dtype).mul_(factor)


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Takes the singular values of a matrix [rows, columns] near 1, by `steps` iterations of aX + bXX'X + cXX'XX'X.

    In the matrix's own format. A matrix of zeros stays one.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.T if is_tall else x
