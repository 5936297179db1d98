"""Finds a rank's parts of parameters in the flat partitions of ZeRO-1, of which each optimizer group has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter's share that a rank's partition holds; both ranges are empty where it holds none."""

    parameter: nn.Parameter
    own: slice
    """Elements of the flattened share."""
    place: slice
    """Their place in the partition."""

    @property
    def size(self) -> int:
        """Returns its elements."""
        size: int = self.own.stop - self.own.start
        return size


def grouped_parameters(optimizer: Any) -> list[list[nn.Parameter]]:
    """Returns a rank's parameters by the groups of DeepSpeed's `optimizer`, in the order of its flat tensors."""
    groups: list[list[nn.Parameter]] = (
        optimizer.bf16_groups if isinstance(optimizer, BF16_Optimizer) else optimizer.bit16_groups
    )
    return groups


def grouped_fragments(optimizer: Any) -> list[list[Fragment]]:
    """Returns the fragments of all parameters of this rank's stage, by group. Padding is in none."""
    return [[_fragment(parameter) for parameter in parameters] for parameters in grouped_parameters(optimizer)]


def _fragment(parameter: nn.Parameter) -> Fragment:
    mapping: Any = parameter.__dict__["_hp_mapping"]
    if mapping is None:
        return Fragment(parameter, slice(0, 0), slice(0, 0))
    own, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return Fragment(
        parameter, slice(own.start, own.start + own.numel), slice(there.start, there.start + there.numel)
    )  # fmt: skip
