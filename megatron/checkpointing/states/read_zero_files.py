"""Reads the optimizer state that DeepSpeed 0.19.8 writes under ZeRO stage 1, whole and by parameter.

Each rank keeps the fp32 weights and the moments of its parameter groups in flat tensors, of which every data-parallel
rank has a piece in a file of its own; the file says where in the piece each parameter lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpointing.states.layer_state import ParameterState
from megatron.checkpointing.states.parameter_layout import LayerLayout, merge, shard_shape
from megatron.checkpointing.states.tensor_folder import named_tensors
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.config.optimizer import facts_of
from megatron.errors import CheckpointError
from megatron.model.causal_lm import from_engine_name

MASTER = "fp32"
"""Name of the fp32 weights in universal files, beside the moments' own."""
COUNTERS = ("lr_scheduler", "global_steps", "global_samples", "skipped_steps", "ds_version")
"""Entries of the engine's file that mean the same in every layout."""
LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""Entries of fp16's loss scale, the same on all ranks."""
MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""Errors of Python and torch where a file that could be read holds other things than DeepSpeed writes."""


@dataclass(frozen=True)
class EngineState:
    """Part of DeepSpeed's files that is the same for all ranks and parameters."""

    counters: Mapping[str, Any]
    """Content of an `mp_rank_*` file: steps, samples, schedule, version; some entries depend on the layout."""
    precision: str
    """Number format that the run was in: fp32, bf16 or fp16."""
    hyperparameters: Mapping[str, Mapping[str, Any]]
    """Entries that the optimizer saved with each parameter group, by the group's name."""
    clip_grad: float
    loss_scale: Mapping[str, Any]
    """Entries of LOSS_SCALE; empty for bf16."""


@dataclass(frozen=True)
class _Piece:
    """The part of a tensor-parallel rank's share that one data-parallel rank keeps."""

    flat: Mapping[str, Tensor]
    step: float | None
    start: int
    size: int


class ZeroFiles:
    """The open optimizer files of a checkpoint, memory-mapped."""

    def __init__(self, checkpoint: Checkpoint, layouts: list[LayerLayout]) -> None:
        """Opens them all. Raises CheckpointError when a file is missing, damaged or unsafe, or holds something else."""
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._specs = {layout.global_name(name): spec for layout in layouts for name, spec in layout.parameters.items()}
        self._facts = facts_of(self._config.training.optimizer)
        self._hyperparameters: dict[str, Mapping[str, Any]] = {}
        self._clip_grad = 0.0
        self._loss_scale: dict[str, Any] = {}
        self._pieces: dict[str, list[list[_Piece]]] = {}
        sizes = checkpoint.state
        ranks = product(*map(range, (sizes.pipe_parallel_size, sizes.tensor_parallel_size, sizes.data_parallel_size)))
        stage_of: dict[str, int] = {}
        steps: dict[tuple[int, str], float | None] = {}
        for pipe, tensor, data in ranks:
            model_rank = pipe * sizes.tensor_parallel_size + tensor
            file = optimizer_file(checkpoint.path, model_rank, data, self._config.training.precision.dtype)
            content = load_tensors(file)
            try:
                for name, piece in self._read(content["optimizer_state_dict"], file):
                    group = (pipe, self._facts.group_of(self._specs[name]).name)
                    if steps.setdefault(group, piece.step) != piece.step:
                        raise ValueError(f"{group[1]} stepped {piece.step} times, by another rank {steps[group]}")
                    # A tied embedding lies on the last stage as well, with the same values.
                    if stage_of.setdefault(name, pipe) == pipe:
                        shares = self._pieces.setdefault(name, [[] for _ in range(sizes.tensor_parallel_size)])
                        shares[tensor].append(piece)
            except MISFITS as error:
                raise CheckpointError(
                    f"{file} does not hold the optimizer state that DeepSpeed 0.19.8 writes ({error!r})."
                ) from error

    def engine_state(self) -> EngineState:
        """Returns what the files say of the run as a whole."""
        file = self._checkpoint.path / "mp_rank_00_model_states.pt"
        counters = load_tensors(file)
        if not isinstance(counters, dict) or not counters.keys() >= set(COUNTERS):
            raise CheckpointError(f"{file} does not hold what DeepSpeed 0.19.8 writes.")
        return EngineState(
            # DeepSpeed's own configuration is written anew by every run, and nothing reads it.
            counters={key: value for key, value in counters.items() if key != "ds_config"},
            precision=self._config.training.precision.dtype,
            hyperparameters=self._hyperparameters,
            clip_grad=self._clip_grad,
            loss_scale=self._loss_scale,
        )

    def read(self, layout: LayerLayout, weights: Mapping[str, Tensor]) -> dict[str, ParameterState]:
        """Returns one layer's parameters by local name, their weights taken from `weights`.

        Raises CheckpointError when a parameter is missing or has another size than its share.
        """
        return {local: self._merged(layout, local, weight) for local, weight in weights.items()}

    def _read(self, content: dict[str, Any], file: Path) -> Iterator[tuple[str, _Piece]]:
        base, self._clip_grad = content["base_optimizer_state"], content["clip_grad"]
        self._loss_scale = {key: content[key] for key in LOSS_SCALE if key in content}
        groups = zip(content["single_partition_of_fp32_groups"], content["param_slice_mappings"], strict=True)
        for group, (master, pieces) in enumerate(groups):
            state = base["state"].get(group, {})
            # torch counts steps by parameter, apex by group.
            step = state.get("step", base["param_groups"][group].get("step"))
            flat = {MASTER: master.detach(), **{name: state[name] for name in self._facts.moments if name in state}}
            named_tensors(flat, file)
            hyperparameters = base["param_groups"][group]
            if not isinstance(hyperparameters, dict) or not all(isinstance(key, str) for key in hyperparameters):
                raise TypeError(f"hyperparameters of group {group}")
            for engine_name, address in pieces.items():
                name = from_engine_name(engine_name, self._config.model)
                label = self._facts.group_of(self._specs[name]).name
                self._hyperparameters[label] = hyperparameters
                yield name, _Piece(flat, None if step is None else float(step), address.start, address.numel)

    def _merged(self, layout: LayerLayout, local: str, weight: Tensor) -> ParameterState:
        name, spec = layout.global_name(local), layout.parameters[local]
        path = self._checkpoint.path
        try:
            shares = self._pieces[name]
            shape = shard_shape(spec, len(shares))
            first = shares[0][0]
            merged = {
                key: merge([_joined(pieces, key).reshape(shape) for pieces in shares], spec) for key in first.flat
            }
            return ParameterState(weight, merged.pop(MASTER), merged, first.step)
        except MISFITS as error:
            raise CheckpointError(f"{path}: the optimizer state of {name} is not whole: {error!r}.") from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: the optimizer state of {name}: {error}.") from error


def optimizer_file(folder: Path, model_rank: int, data_rank: int, dtype: str) -> Path:
    """Returns the path of one rank's optimizer state; `model_rank` counts stages, then tensor-parallel ranks."""
    prefix = "bf16_" if dtype == "bf16" else ""
    return folder / f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def _joined(pieces: list[_Piece], key: str) -> Tensor:
    parts = [piece.flat[key].narrow(0, piece.start, piece.size) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
