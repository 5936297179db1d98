"""AdamW with decoupled weight decay and bias correction (Loshchilov & Hutter 2019), as in the published runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron.config.bounds import NonNegative, Positive
from megatron.config.neox_entries import Rejected, absent_flag
from megatron.config.optimizer import (
    OPTIMIZERS,
    Implementation,
    OptimizerConfig,
    OptimizerFacts,
    ParameterGroup,
    check_betas,
)


class AdamWConfig(OptimizerConfig):
    """AdamW. Weight decay spares norms and biases."""

    type: Literal["Adam", "AdamW"] = "Adam"
    """NeoX's "Adam" is decoupled AdamW; both names mean that here."""

    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decay of the first and second moment."""

    eps: Positive = 1.0e-8
    """Added to the root of the second moment."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay on everything but norms and biases."""


def _arguments(section: AdamWConfig, **own: bool) -> dict[str, Any]:
    beta1, beta2 = section.betas
    return {"lr": section.lr, "betas": (beta1, beta2), "eps": section.eps, **own}


OPTIMIZERS.register("adamw")(
    OptimizerFacts(
        section=AdamWConfig,
        moments=("exp_avg", "exp_avg_sq"),
        squared_moments=("exp_avg_sq",),
        groups=(
            ParameterGroup(
                "decayed",
                takes=lambda parameter: parameter.decays,
                options=lambda section: {"weight_decay": section.weight_decay},
            ),
            ParameterGroup("not decayed", takes=lambda parameter: True, options=lambda section: {"weight_decay": 0.0}),
        ),
        implementations={
            "torch AdamW": Implementation(
                "megatron.training.optimizers.adamw:CacheBlockedAdamW",
                lambda section: _arguments(section, fused=False),
            ),
            "torch fused AdamW": Implementation(
                "torch.optim:AdamW",
                lambda section: _arguments(section, fused=True),
                step_on_device=True,
                switch="torch_fused_adamw",
                gpu="preferred",
            ),
            "apex FusedAdam": Implementation(
                "apex.optimizers:FusedAdam",
                lambda section: _arguments(section, adam_w_mode=True),
                step_count="group",
                switch="apex_fused_adam",
                gpu="required",
                how_to_get_it="Install apex, or set the key to auto or off.",
            ),
        },
        check=check_betas,
        neox_keys={
            "momentum": Rejected("Adam has no momentum beyond its betas", harmless=(0,), accepts=float),
            "max_grad_norm": Rejected("DeepSpeed's old place for it", "use gradient_clipping", accepts=float),
            "freeze_step": Rejected("1-bit Adam is not implemented"),
            "cuda_aware": absent_flag("1-bit Adam is not implemented"),
            "bias_correction": Rejected("Adam always corrects its bias", harmless=(True,), accepts=bool),
            "adam_w_mode": Rejected("weight decay is always decoupled", harmless=(True,), accepts=bool),
            "amsgrad": absent_flag("AMSGrad is not implemented"),
        },
    )
)
