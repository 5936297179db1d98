"""Builds the optimizer that the configuration names, as its facts declare it (megatron/config/optimizers)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from megatron.checkpointing.engine.flat_partitions import Fragment, grouped_fragments
from megatron.config.optimizer import OptimizerConfig, facts_of
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec


def parameter_groups(module: nn.Module, section: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits the trainable parameters of `module` into the optimizer's groups, with their options.

    A group without parameters is left out: a middle pipeline stage of a model without biases has only one of AdamW's.
    """
    facts = facts_of(section)
    members: dict[str, list[nn.Parameter]] = {group.name: [] for group in facts.groups}
    for parameter in module.parameters():
        if parameter.requires_grad:
            members[facts.group_of(parameter_spec(parameter)).name].append(parameter)
    return [{"params": members[group.name], **group.options(section)} for group in facts.groups if members[group.name]]


def build_optimizer(module: nn.Module, section: OptimizerConfig, implementation: str) -> torch.optim.Optimizer:
    """Builds one of the optimizer's implementations, by its name in the facts; all compute the same.

    Raises EnvironmentSetupError when its package is missing.
    """
    chosen = facts_of(section).implementations[implementation]
    optimizer: torch.optim.Optimizer = chosen.load_factory()(
        parameter_groups(module, section), **chosen.arguments(section)
    )
    return optimizer


@runtime_checkable
class UsesPartitions(Protocol):
    """An optimizer whose step needs to know which parameters lie where in a rank's flat partitions."""

    def use_partitions(self, groups: Sequence[Sequence[Fragment]], context: ParallelContext) -> None:
        """Takes the fragments by group. Collective over all ranks."""


def give_partitions(base: torch.optim.Optimizer, wrapper: Any, context: ParallelContext) -> None:
    """Tells an optimizer that asks for it where parameters lie in the flat partitions that DeepSpeed has made of them.

    `wrapper` is the engine's optimizer around `base`. Collective over all ranks.
    """
    if isinstance(base, UsesPartitions):
        base.use_partitions(grouped_fragments(wrapper), context)
