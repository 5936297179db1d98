"""Parameter groups and AdamW."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import nn

from megatron.config.optimizer import OptimizerConfig
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.mpu.parameters import decays
from megatron.registry import require

Implementation = Literal["torch AdamW", "torch fused AdamW", "apex FusedAdam"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters of `module` into those with weight decay and those without (norms and biases).

    A group without parameters is left out: a middle pipeline stage of a model without biases has only one.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, implementation: Implementation = "torch AdamW"
) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay and bias correction (Loshchilov & Hutter 2019), as in the published runs.

    Every implementation computes the same; apex's needs its package. Raises EnvironmentSetupError without it.
    """
    groups = parameter_groups(module, config.weight_decay)
    config = cast(AdamWConfig, config)
    beta1, beta2 = config.betas
    if implementation == "apex FusedAdam":
        optimizers = require("apex.optimizers", "apex_fused_adam: on", "Install apex, or set the key to auto or off.")
        fused: torch.optim.Optimizer = optimizers.FusedAdam(
            groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, adam_w_mode=True
        )
        return fused
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=implementation == "torch fused AdamW"
    )
