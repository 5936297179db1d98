"""Checks of the section `speedups`."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding
from megatron.config.optimizer import facts_of, registered_optimizers
from megatron.config.sections.run_config import RunConfig
from megatron.registry import variant_names


def _optimizer_switches(run: RunConfig) -> Iterator[Finding]:
    own = facts_of(run.training.optimizer).switches
    others = {switch for facts in registered_optimizers() for switch in facts.switches}.difference(own)
    for switch in sorted(others):
        if getattr(run.speedups, switch) == "on":
            name = run.training.optimizer.type
            yield Finding(f"speedups.{switch}", f"the optimizer {name} has no such implementation; use auto or off")
    chosen = [switch for switch in own if getattr(run.speedups, switch) == "on"]
    if len(chosen) > 1:
        yield Finding(f"speedups.{chosen[0]}", f"cannot be on together with {chosen[1]}; choose one of them")


def _flash_attention(run: RunConfig) -> Iterator[Finding]:
    if run.speedups.flash_attention == "on" and run.training.precision.dtype == "fp32":
        yield Finding(
            "speedups.flash_attention",
            "flash-attn computes in bf16 and fp16 only, and this run is in fp32; use precision: bfloat16, or "
            "flash_attention: auto",
        )


_SCORES = "training.checkpoint_activations.scores"


_TRITON_THETAS = "megatron.kernels.pattention.triton_thetas"


def _loss_of_a_teacher(run: RunConfig) -> Iterator[Finding]:
    if run.distillation is not None and run.speedups.fused_cross_entropy == "on":
        yield Finding(
            "speedups.fused_cross_entropy", "the divergence from a teacher is one of whole logits; use auto or off"
        )


def _pattention(run: RunConfig) -> Iterator[Finding]:
    choice, tokens = run.speedups.pattention, run.model.param_tokens
    if choice == "reference" and run.training.checkpoint_activations.scores:
        yield Finding(_SCORES, "the reference keeps all its scores; use eager")
    if tokens is None:
        asked = {"speedups.pattention": choice != "auto", _SCORES: run.training.checkpoint_activations.scores}
        for path, is_asked in asked.items():
            if is_asked:
                yield Finding(path, f"architecture {run.model.architecture} has no Pattention; leave it out")
    elif choice == "triton" and tokens.theta not in (known := variant_names(_TRITON_THETAS)):
        yield Finding(
            "speedups.pattention",
            f"norm_activation_type {tokens.theta} has no formulas in Triton, only {', '.join(known)} have; use auto, "
            "eager or compile",
        )


CHECKS: tuple[Check, ...] = (
    _optimizer_switches,
    _flash_attention,
    _pattention,
    _loss_of_a_teacher,
)
