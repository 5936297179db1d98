"""A checkpoint's optimizer state by parameter, whole, whatever layout and precision wrote it.

DeepSpeed's ZeRO stage 1 keeps the fp32 weights and the moments of a rank's parameters in flat tensors, of which every
data-parallel rank has a piece in a file of its own; the file says where each parameter's piece lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpointing.states.parameter_layout import LayerLayout, merge, shard_shape
from megatron.checkpointing.states.weights import checkpoint_layouts
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
from megatron.model.causal_lm import from_engine_name

STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""What there is of a parameter: the weights that the optimizer changes, and Adam's moments; these come with the first
step."""
LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")
"""What the optimizer knows besides, the same on all ranks."""


@dataclass(frozen=True)
class _Piece:
    """Where one data-parallel rank keeps its piece of a parameter's share."""

    flat: dict[str, Tensor]
    start: int
    size: int


class OptimizerFiles:
    """The open optimizer files of a checkpoint, memory-mapped."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError when a file is missing, damaged or unsafe, or holds something else."""
        self.path = checkpoint.path
        self.steps: float | None = None
        """Steps that Adam's bias correction counts; None before the first [steps]."""
        self.loss_scale: dict[str, Any] = {}
        self.clip_grad = 0.0
        self.hyperparameters: dict[bool, dict[str, Any]] = {}
        """Of the parameters with weight decay and of those without, as torch keeps them for a group."""
        self.engine_names: dict[str, str] = {}
        """Global name to the one in DeepSpeed's files."""
        self._pieces: dict[str, list[list[_Piece]]] = {}
        self._decays = {
            layout.global_name(name): spec.decays
            for layout in checkpoint_layouts(checkpoint)
            for name, spec in layout.parameters.items()
        }
        self._model = checkpoint.config.model
        config, sizes = checkpoint.config, checkpoint.state
        ranks = product(*map(range, (sizes.pipe_parallel_size, sizes.tensor_parallel_size, sizes.data_parallel_size)))
        stage_of: dict[str, int] = {}
        for pipe, tensor, data in ranks:
            file = optimizer_file(
                self.path, pipe * sizes.tensor_parallel_size + tensor, data, config.training.precision.dtype
            )
            content = load_tensors(file)
            try:
                for name, piece in self._read(content["optimizer_state_dict"]):
                    # A tied embedding lies on the last stage as well, with the same values.
                    if stage_of.setdefault(name, pipe) == pipe:
                        shares = self._pieces.setdefault(name, [[] for _ in range(sizes.tensor_parallel_size)])
                        shares[tensor].append(piece)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(
                    f"{file} does not hold the optimizer state that DeepSpeed 0.19.8 writes ({error!r})."
                ) from error

    def _read(self, content: dict[str, Any]) -> Iterator[tuple[str, _Piece]]:
        base, self.clip_grad = content["base_optimizer_state"], content["clip_grad"]
        self.loss_scale = {key: content[key] for key in LOSS_SCALE if key in content}
        groups = zip(content["single_partition_of_fp32_groups"], content["param_slice_mappings"], strict=True)
        for group, (fp32, pieces) in enumerate(groups):
            state = base["state"].get(group, {})
            # torch counts steps by parameter, apex by group.
            steps = state.get("step", base["param_groups"][group].get("step"))
            self.steps = None if steps is None else float(steps)
            flat = {"fp32": fp32.detach(), **{key: state[key] for key in STATES if key in state}}
            for engine_name, address in pieces.items():
                name = from_engine_name(engine_name, self._model)
                self.engine_names[name] = engine_name
                self.hyperparameters[self._decays[name]] = base["param_groups"][group]
                yield name, _Piece(flat, address.start, address.numel)

    def read_layer(self, layout: LayerLayout) -> dict[str, dict[str, Tensor]]:
        """One layer's state, whole: by global name, then by name in STATES.

        Raises CheckpointError when a parameter is missing or has another size than its share.
        """
        return {
            layout.global_name(name): self._merged(layout.global_name(name), layout, name) for name in layout.parameters
        }

    def _merged(self, name: str, layout: LayerLayout, local_name: str) -> dict[str, Tensor]:
        spec = layout.parameters[local_name]
        try:
            shares = self._pieces[name]
            shape = shard_shape(spec, len(shares))
            return {
                key: merge([_joined(pieces, key).reshape(shape) for pieces in shares], spec)
                for key in shares[0][0].flat
            }
        except (KeyError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: the optimizer state of {name} is not whole: {error!r}.") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: the optimizer state of {name}: {error}.") from error


def optimizer_file(folder: Path, model_rank: int, data_rank: int, dtype: str) -> Path:
    """Where DeepSpeed keeps the optimizer state of one rank; `model_rank` counts stages, then tensor-parallel ranks."""
    prefix = "bf16_" if dtype == "bf16" else ""
    return folder / f"{prefix}zero_pp_rank_{data_rank}_mp_rank_{model_rank:02d}_optim_states.pt"


def _joined(pieces: list[_Piece], key: str) -> Tensor:
    parts = [piece.flat[key].narrow(0, piece.start, piece.size) for piece in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
