"""Checks of the section `inherit`.

What needs the reference, such as its number of layers, is checked where it is read (megatron/growth/inheriting).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig


def _start(run: RunConfig) -> Iterator[Finding]:
    """Requires a reference, and a place for what goes on from it."""
    rules, checkpoint = run.inherit, run.checkpoint
    if rules is None:
        return
    if checkpoint.load is None:
        yield Finding("inherit.operator", "needs load: the folder of the reference's checkpoint")
    elif checkpoint.save is None and not checkpoint.finetune:
        yield Finding(
            "inherit.operator", "needs save: the run goes on from a checkpoint of the new model there; or finetune: "
            "true, with which it takes weights alone",
        )  # fmt: skip
    if run.grow is not None and run.grow.at_step is None and run.grow.at_tokens is None:
        yield Finding("inherit.operator", "contradicts grow without grow.at_step or grow.at_tokens: each says what the "
                      "run starts from; keep one")  # fmt: skip
    if checkpoint.pretrain_partial_init is not None:
        yield Finding(
            "inherit.operator", "contradicts pretrain_partial_init: each says what the run starts from; keep one"
        )


def _weights_alone(run: RunConfig) -> Iterator[Finding]:
    rules = run.inherit
    if rules is None or not run.checkpoint.finetune:
        return
    needed = {"moments": "reset_all", "schedule": "restart", "data": "restart"}
    for name, value in needed.items():
        if getattr(rules, name) != value:
            yield Finding(
                f"inherit.{name}", f"contradicts finetune: true, which takes weights alone; use {value}, or finetune: "
                "false",
            )  # fmt: skip


def _choice(run: RunConfig) -> Iterator[Finding]:
    rules = run.inherit
    if rules is None:
        return
    if rules.layers == []:
        yield Finding("inherit.layers", "names no layer; operator random takes none of a layer")
    if len(set(rules.sublayers)) < len(rules.sublayers):
        yield Finding("inherit.sublayers", "names a part twice")


CHECKS: tuple[Check, ...] = (_start, _weights_alone, _choice)
