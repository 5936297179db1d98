"""Writes a pipeline stage's files as DeepSpeed 0.19.8 does under ZeRO stage 1, from whole parameters in any order.

For each parameter group, a tensor-parallel rank's shares lie one after another in a flat tensor, padded so that it
divides evenly; each data-parallel rank has an equal piece. The pieces are filled as the parameters come, in memory that
is mapped from unnamed files: what must be held at a time is one parameter, not one stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.precision_config import DeepSpeedFP16Config
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from megatron.checkpointing.states.layer_state import ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, split
from megatron.checkpointing.states.read_zero_files import MASTER, EngineState, optimizer_file
from megatron.checkpointing.states.stage_parameters import StageParameter
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.deepspeed_json import precision_section
from megatron.config.optimizer import facts_of
from megatron.config.sections.training import PrecisionConfig, TrainingConfig
from megatron.errors import CheckpointError
from megatron.mpu.parameters import DTYPES

ALIGNMENT = 2  # elements: pieces begin at multiples of four bytes in every precision


class StageFiles:
    """The files of one pipeline stage on their way."""

    def __init__(
        self,
        folder: Path,
        stage: int,
        parameters: Sequence[StageParameter],
        sizes: ParallelSizes,
        training: TrainingConfig,
    ) -> None:
        """Takes the stage's `parameters` in the order of DeepSpeed's module."""
        self.folder = folder
        self.stage = stage
        self.sizes = sizes
        self.training = training
        facts = facts_of(training.optimizer)
        by_group = {
            group.name: tuple(p for p in parameters if facts.group_of(p.spec) is group) for group in facts.groups
        }
        self._groups = {name: _FlatGroup(members, sizes) for name, members in by_group.items() if members}
        self._buffers: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self._steps: dict[str, set[float | None]] = {name: set() for name in self._groups}
        self._missing = {parameter.global_name for parameter in parameters}

    @property
    def is_complete(self) -> bool:
        """Tells whether every parameter of the stage has come."""
        return not self._missing

    def add(self, name: str, state: ParameterState) -> None:
        """Takes a parameter, given by global name, if it belongs to the stage."""
        for group, flat in self._groups.items():
            for parameter in flat.parameters:
                if parameter.global_name == name:
                    self._fill(group, parameter, state)
                    self._steps[group].add(state.step)
                    self._missing.discard(name)

    def write(self, engine: EngineState) -> dict[str, FileEntry]:
        """Writes what all ranks of the stage keep beside the layers.

        Raises CheckpointError when the parameters of a group were stepped differently often.
        """
        written: dict[str, FileEntry] = {}
        loss_scale = _loss_scale(engine, self.training.precision)
        for tensor_rank in range(self.sizes.tensor):
            model_rank = self.stage * self.sizes.tensor + tensor_rank
            layout = {
                "param_shapes": [flat.share_shapes() for flat in self._groups.values()],
                "dp_world_size": self.sizes.data,
                "mp_world_size": self.sizes.tensor * self.sizes.pipe,
                "checkpoint_parallel_dimensions": {"pp_degree": self.sizes.pipe, "tp_degree": self.sizes.tensor},
            }
            contents = {self.folder / f"mp_rank_{model_rank:02d}_model_states.pt": dict(engine.counters) | layout}
            for data_rank in range(self.sizes.data):
                file = optimizer_file(self.folder, model_rank, data_rank, self.training.precision.dtype)
                contents[file] = self._optimizer_content(tensor_rank, data_rank, engine, loss_scale)
            written |= {file.name: write_tensors(content, file) for file, content in contents.items()}
        self._buffers.clear()
        return written

    def _fill(self, group: str, parameter: StageParameter, state: ParameterState) -> None:
        flat = self._groups[group]
        for key, whole in ({MASTER: state.master} | dict(state.moments)).items():
            if whole is None:
                raise CheckpointError(f"{parameter.global_name} has no fp32 weights, and other parameters have.")
            for tensor_rank, share in enumerate(split(whole, parameter.spec, self.sizes.tensor)):
                values = share.reshape(-1)
                for data_rank, own, there in flat.overlaps(parameter.engine_name):
                    self._buffer(group, tensor_rank, data_rank, key)[there] = values[own]

    def _buffer(self, group: str, tensor_rank: int, data_rank: int, key: str) -> Tensor:
        buffers = self._buffers.setdefault((group, tensor_rank, data_rank), {})
        if key not in buffers:
            flat = self._groups[group]
            size = flat.piece_size
            if key == MASTER and self.training.precision.dtype != "bf16":
                # Another class of DeepSpeed's, which drops the padding of the weights but not of the moments.
                size -= flat.padding(data_rank)
            buffers[key] = _mapped_zeros(self.folder, size)
        return buffers[key]

    def _optimizer_content(
        self, tensor_rank: int, data_rank: int, engine: EngineState, loss_scale: Mapping[str, Any]
    ) -> dict[str, Any]:
        pieces = [self._buffers[name, tensor_rank, data_rank] for name in self._groups]
        moments = {
            number: self._step_entry(name) | {key: tensor for key, tensor in piece.items() if key != MASTER}
            for number, (name, piece) in enumerate(zip(self._groups, pieces, strict=True))
            if len(piece) > 1
        }
        content: dict[str, Any] = {
            "clip_grad": engine.clip_grad,
            "base_optimizer_state": {
                "state": moments,
                "param_groups": [
                    self._hyperparameters(name, engine) | {"params": [number]}
                    for number, name in enumerate(self._groups)
                ],
            },
            "single_partition_of_fp32_groups": [piece[MASTER] for piece in pieces],
            "group_paddings": [flat.padding(data_rank) for flat in self._groups.values()],
            "partition_count": [self.sizes.data] * len(self._groups),
            "ds_version": engine.counters["ds_version"],
            "param_slice_mappings": [dict(flat.addresses(data_rank)) for flat in self._groups.values()],
        }
        if self.training.precision.dtype != "bf16":
            content |= {
                **loss_scale,
                "zero_stage": ZeroStageEnum.optimizer_states,
                "param_alignment_paddings": [[0] * len(flat.parameters) for flat in self._groups.values()],
            }
        return {"optimizer_state_dict": content, "ds_version": engine.counters["ds_version"]}

    def _hyperparameters(self, group: str, engine: EngineState) -> dict[str, Any]:
        if group in engine.hyperparameters:
            return dict(engine.hyperparameters[group])
        # The source had no parameter in this group: it differs from the others by its own options alone.
        other = next(iter(engine.hyperparameters.values()))
        section = self.training.optimizer
        own = next(declared for declared in facts_of(section).groups if declared.name == group)
        return dict(other) | own.options(section)

    def _step_entry(self, group: str) -> dict[str, Tensor]:
        """Returns the group's step count as torch keeps it; nothing for an optimizer that counts none."""
        if len(self._steps[group]) > 1:
            raise CheckpointError(
                f"parameters of one group ({group}) were stepped {sorted(map(str, self._steps[group]))} times; the "
                "optimizer keeps one count for all of them."
            )
        (step,) = self._steps[group]
        return {} if step is None else {"step": torch.tensor(step)}


@dataclass(frozen=True)
class _FlatGroup:
    """The flat tensor of a parameter group, the same for each tensor-parallel rank, and its pieces."""

    parameters: tuple[StageParameter, ...]
    sizes: ParallelSizes

    @cached_property
    def _extents(self) -> dict[str, tuple[int, int]]:
        """Returns the first element of each parameter's share and the one after its last, by name in the engine."""
        extents, start = {}, 0
        for name, shape in self.share_shapes().items():
            extents[name] = (start, start + shape.numel())
            start += shape.numel()
        return extents

    @property
    def _used(self) -> int:
        return max(stop for _, stop in self._extents.values())

    @property
    def piece_size(self) -> int:
        """Returns the elements of one data-parallel rank's piece, padding included."""
        step = ALIGNMENT * self.sizes.data
        return -(-self._used // step) * step // self.sizes.data

    def share_shapes(self) -> dict[str, torch.Size]:
        """Returns the shapes of a tensor-parallel rank's shares by the parameters' names in the engine."""
        return {
            parameter.engine_name: torch.Size(
                size // self.sizes.tensor if dim == parameter.spec.shard_dim else size
                for dim, size in enumerate(parameter.spec.full_shape)
            )
            for parameter in self.parameters
        }

    def padding(self, data_rank: int) -> int:
        """Returns how many elements at the end of a piece belong to no parameter."""
        return min(max((data_rank + 1) * self.piece_size - self._used, 0), self.piece_size)

    def overlaps(self, engine_name: str) -> Iterator[tuple[int, slice, slice]]:
        """Yields (data-parallel rank, part of the parameter's share, its place in the rank's piece)."""
        start, stop = self._extents[engine_name]
        for data_rank in range(start // self.piece_size, -(-stop // self.piece_size)):
            first = data_rank * self.piece_size
            begin, end = max(start, first), min(stop, first + self.piece_size)
            yield data_rank, slice(begin - start, end - start), slice(begin - first, end - first)

    def addresses(self, data_rank: int) -> Iterator[tuple[str, fragment_address]]:
        """Yields each parameter that has elements in a piece, with its place there."""
        for name in self._extents:
            for rank, _, there in self.overlaps(name):
                if rank == data_rank:
                    yield name, fragment_address(numel=there.stop - there.start, start=there.start)


def _mapped_zeros(folder: Path, size: int) -> Tensor:
    """Returns float32 zeros whose memory the system may write out to an unnamed file in `folder`."""
    if size == 0:
        return torch.zeros(0)
    path = folder / "unnamed"
    tensor = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
    # The mapping outlives the name, and a killed process leaves nothing behind.
    path.unlink()
    return tensor


def _loss_scale(engine: EngineState, precision: PrecisionConfig) -> Mapping[str, Any]:
    """Returns the loss scale to go on with: the run's own, or the configured first one in another number format."""
    if engine.precision == precision.dtype:
        return engine.loss_scale
    if precision.dtype == "bf16":
        return {}
    settings = DeepSpeedFP16Config(**precision_section(precision).get("fp16", {}))
    scaler = CreateLossScaler(
        dtype=DTYPES[precision.dtype],
        static_loss_scale=settings.loss_scale,
        dynamic_scaling=settings.loss_scale == 0,
        dynamic_loss_args=settings.dynamic_loss_scale_args(),
    )
    return {"loss_scaler": scaler, "dynamic_loss_scale": scaler.dynamic, "overflow": False}
