"""Muon for hidden matrices, AdamW for everything else (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron.config.bounds import NonNegative, Positive
from megatron.config.neox_entries import Inert, Rejected, only
from megatron.config.optimizer import (
    OPTIMIZERS,
    Implementation,
    OptimizerConfig,
    OptimizerFacts,
    ParameterGroup,
    check_betas,
)
from megatron.config.section import Key

_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_ONE_SCALE = "the original scale asks which side of a matrix is its input, and key and value tokens differ in that"


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the layers, parameter tokens among them; AdamW for embeddings, head, norms and biases.
    Weight decay spares norms and biases."""

    type: Literal["Muon"] = "Muon"
    """Name."""

    adam_lr: Annotated[Positive | None, Key(difference="DeepSpeed's key, not NeoX's")] = None
    """Peak learning rate of what AdamW steps beside Muon; None means lr. Its schedule is that of lr, in proportion."""

    momentum: Annotated[float, Key(difference="DeepSpeed's key, not NeoX's")] = Field(default=0.95, ge=0.0, lt=1.0)
    """Decay of Muon's average of gradients."""

    nesterov: Annotated[bool, Key(difference="torch's argument, not NeoX's")] = True
    """Let Muon orthogonalize its average with the newest gradient counted once more, in place of the average."""

    ns_steps: Annotated[int, Key(difference="torch's argument, not NeoX's")] = Field(default=5, ge=1, le=20)
    """Newton-Schulz iterations of Muon's orthogonalization."""

    ns_dtype: Annotated[Literal["fp32", "bf16"], Key(difference="torch always takes bf16")] = "fp32"
    """Number format of those iterations. bf16 is faster on GPUs, and changes steps by about 1 %."""

    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay of the first and second moment."""

    eps: Positive = 1.0e-8
    """Added to the root of AdamW's second moment."""

    weight_decay: NonNegative = 0.1
    """Decoupled weight decay on everything but norms and biases."""


def _arguments(section: MuonConfig, *, fused: bool) -> dict[str, Any]:
    beta1, beta2 = section.betas
    return {
        "lr": section.lr,
        "momentum": section.momentum,
        "nesterov": section.nesterov,
        "ns_steps": section.ns_steps,
        "ns_dtype": section.ns_dtype,
        "betas": (beta1, beta2),
        "eps": section.eps,
        "fused": fused,
    }


def _adam_options(section: MuonConfig, weight_decay: float) -> dict[str, Any]:
    ratio = 1.0 if section.adam_lr is None else section.adam_lr / section.lr
    return {"weight_decay": weight_decay, "lr_ratio": ratio, "orthogonalized": False}


OPTIMIZERS.register("muon")(
    OptimizerFacts(
        section=MuonConfig,
        moments=("momentum_buffer", *_ADAM_MOMENTS),
        squared_moments=("exp_avg_sq",),
        groups=(
            ParameterGroup(
                "hidden matrices",
                takes=lambda parameter: parameter.is_hidden_matrix,
                options=lambda section: {
                    "weight_decay": section.weight_decay,
                    "lr_ratio": 1.0,
                    "orthogonalized": True,
                },
                moments=("momentum_buffer",),
                counts_steps=False,
            ),
            ParameterGroup(
                "decayed",
                takes=lambda parameter: parameter.decays,
                options=lambda section: _adam_options(section, section.weight_decay),
                moments=_ADAM_MOMENTS,
            ),
            ParameterGroup(
                "not decayed",
                takes=lambda parameter: True,
                options=lambda section: _adam_options(section, 0.0),
                moments=_ADAM_MOMENTS,
            ),
        ),
        implementations={
            "Muon, torch AdamW": Implementation(
                "megatron.training.optimizers.muon:OrthogonalizedMomentum",
                lambda section: _arguments(section, fused=False),
            ),
            "Muon, torch fused AdamW": Implementation(
                "megatron.training.optimizers.muon:OrthogonalizedMomentum",
                lambda section: _arguments(section, fused=True),
                step_on_device=True,
                switch="torch_fused_adamw",
                gpu="preferred",
            ),
        },
        learning_rates=("lr", "adam_lr"),
        freezes_rows=False,
        check=check_betas,
        neox_keys={
            "muon_lr": Rejected("the learning rate of the hidden matrices is lr", "use lr, and adam_lr for the others"),
            "adjust_lr_fn": Inert(
                str,
                "steps are always scaled to the size of AdamW's",
                only("match_rms_adamw", because=_ONE_SCALE),
            ),
            "ns_coefficients": Rejected("the coefficients are the published ones, 3.4445, -4.7750 and 2.0315"),
        },
    )
)  # fmt: skip
