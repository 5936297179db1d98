"""The files of a pipeline stage, as DeepSpeed 0.19.8 writes them under ZeRO stage 1, from whole parameters.

For each parameter group, a tensor-parallel rank's shares lie one after another in a flat tensor, padded so that it
divides evenly; each data-parallel rank has an equal piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from megatron.checkpointing.states.parameter_layout import split
from megatron.checkpointing.states.read_optimizer import STATES, optimizer_file
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.sections.training import PrecisionConfig
from megatron.mpu.parameters import ParameterSpec

ALIGNMENT = 2  # elements: pieces begin at multiples of four bytes in every precision


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and precision."""

    tensor: int
    pipe: int
    data: int
    precision: PrecisionConfig


@dataclass(frozen=True)
class Common:
    """What all ranks' files say alike."""

    engine: Mapping[str, Any]
    """Content of another layout's file of the engine's state."""
    hyperparameters: Mapping[bool, Mapping[str, Any]]
    """Of the parameter group with weight decay and of that without."""
    steps: float | None
    """Adam's steps; None when there are no moments yet."""
    clip_grad: float
    loss_scale: Mapping[str, Any]
    """What is kept of the loss scale, empty for bf16."""


@dataclass(frozen=True)
class StageParameter:
    """One parameter of a stage."""

    engine_name: str
    spec: ParameterSpec
    states: Mapping[str, Tensor]
    """Whole, by name in STATES."""


def write_stage(
    folder: Path, stage: int, parameters: Sequence[StageParameter], layout: Layout, common: Common
) -> dict[str, FileEntry]:
    """Write what all ranks of a stage write beside the layers. `parameters` are in the order of DeepSpeed's module."""
    by_decay = {decays: [p for p in parameters if p.spec.decays is decays] for decays in (True, False)}
    groups = {decays: group for decays, group in by_decay.items() if group}
    written: dict[str, FileEntry] = {}
    for tensor_rank in range(layout.tensor):
        model_rank = stage * layout.tensor + tensor_rank
        shapes = [
            {p.engine_name: split(p.states["fp32"], p.spec, layout.tensor)[tensor_rank].shape for p in group}
            for group in groups.values()
        ]
        engine = dict(common.engine) | {
            "param_shapes": shapes,
            "dp_world_size": layout.data,
            "mp_world_size": layout.tensor * layout.pipe,
            "checkpoint_parallel_dimensions": {"pp_degree": layout.pipe, "tp_degree": layout.tensor},
        }
        files: dict[Path, Any] = {folder / f"mp_rank_{model_rank:02d}_model_states.pt": engine}
        flat = [_flat(group, tensor_rank, layout) for group in groups.values()]
        for data_rank in range(layout.data):
            file = optimizer_file(folder, model_rank, data_rank, layout.precision.dtype)
            files[file] = _optimizer_content(flat, list(groups), data_rank, layout, common)
        written |= {file.name: write_tensors(content, file) for file, content in files.items()}
    return written


@dataclass(frozen=True)
class _Flat:
    """A parameter group of one tensor-parallel rank."""

    states: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    """Elements of each parameter, by its name in the engine, in their order."""

    def piece(self, key: str, data_rank: int, data_size: int) -> Tensor:
        # A copy, for torch.save writes all of what a view is of.
        return self.states[key].tensor_split(data_size)[data_rank].clone()

    def padding(self, data_rank: int, data_size: int) -> int:
        """Elements at the end of a piece that belong to no parameter."""
        size = self.states["fp32"].numel() // data_size
        return min(max((data_rank + 1) * size - sum(self.sizes.values()), 0), size)

    def addresses(self, data_rank: int, data_size: int) -> Iterator[tuple[str, fragment_address]]:
        """Where in a piece each of its parameters lies."""
        size = self.states["fp32"].numel() // data_size
        first, start = data_rank * size, 0
        for name, count in self.sizes.items():
            begin, end = max(start, first), min(start + count, first + size)
            if begin < end:
                yield name, fragment_address(numel=end - begin, start=begin - first)
            start += count


def _flat(group: Sequence[StageParameter], tensor_rank: int, layout: Layout) -> _Flat:
    states = {}
    for key in STATES:
        shares = [split(p.states[key], p.spec, layout.tensor)[tensor_rank] for p in group if key in p.states]
        if shares:
            elements = sum(share.numel() for share in shares)
            padding = -elements % (ALIGNMENT * layout.data)
            states[key] = torch.cat([*(share.flatten() for share in shares), shares[0].new_zeros(padding)])
    sizes = {p.engine_name: split(p.states["fp32"], p.spec, layout.tensor)[tensor_rank].numel() for p in group}
    return _Flat(states, sizes)


def _optimizer_content(
    flat: Sequence[_Flat], decays: Sequence[bool], data_rank: int, layout: Layout, common: Common
) -> dict[str, Any]:
    place = (data_rank, layout.data)
    moments = {
        number: {"step": torch.tensor(common.steps)}
        | {key: group.piece(key, *place) for key in STATES[1:] if key in group.states}
        for number, group in enumerate(flat)
        if common.steps is not None
    }
    hyperparameters = [dict(common.hyperparameters[d]) | {"params": [number]} for number, d in enumerate(decays)]
    paddings = [group.padding(*place) for group in flat]
    masters = [group.piece("fp32", *place) for group in flat]
    content: dict[str, Any] = {
        "clip_grad": common.clip_grad,
        "base_optimizer_state": {"state": moments, "param_groups": hyperparameters},
        "single_partition_of_fp32_groups": masters,
        "group_paddings": paddings,
        "partition_count": [layout.data] * len(flat),
        "ds_version": common.engine["ds_version"],
        "param_slice_mappings": [dict(group.addresses(*place)) for group in flat],
    }
    if layout.precision.dtype != "bf16":
        # Another class of DeepSpeed's, which drops the padding of the weights but not of the moments.
        content |= {
            **common.loss_scale,
            "zero_stage": ZeroStageEnum.optimizer_states,
            "param_alignment_paddings": [[0] * len(group.sizes) for group in flat],
            "single_partition_of_fp32_groups": [
                master[: master.numel() - padding].clone() for master, padding in zip(masters, paddings, strict=True)
            ],
        }
    return {"optimizer_state_dict": content, "ds_version": common.engine["ds_version"]}
