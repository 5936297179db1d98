"""Names of an architecture's parameters in NeoX's checkpoints, and the YAML keys that their tensors tell, as data.

An architecture is one module in `architectures/`. Names are those within a layer, such as `attention.dense.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron.checkpointing.convert.neox.neox_files import StoredTensor
from megatron.config.sections.model import ModelConfig
from megatron.registry import Registry

NeoxTensors = dict[str, list[StoredTensor]]
"""The tensors of a checkpoint by name `N.local`: the parts of all tensor-parallel ranks, in their order."""

GroupedRows = Literal["by-head", "by-kind"]
"""Order of the rows of packed queries, keys and values where heads of queries share keys and values."""

LayerTensors = Mapping[str, Sequence[StoredTensor]]
"""The tensors of one layer by name: the parts of all tensor-parallel ranks, in their order."""


@dataclass(frozen=True)
class TensorKey:
    """A YAML key whose value can be told from the tensors of a transformer layer."""

    read: Callable[[LayerTensors], Any]
    """Reads the value off the tensors; None where they do not tell it."""
    configured: Callable[[ModelConfig], Any]
    """Returns the value that a configuration has."""


@dataclass(frozen=True)
class NeoxArchitecture:
    """One architecture in NeoX's checkpoints."""

    keys: Mapping[str, TensorKey]
    """Its own YAML keys that the tensors tell; those of every architecture are in neox_model.py."""

    deciding_keys: tuple[tuple[str, str], ...]
    """Beginning of a parameter's name, as a pattern, and the YAML key that decides about its existence and rows. Those
    of every architecture are in neox_names.py."""

    is_recognized: Callable[[LayerTensors], bool] | None = None
    """Tells whether a layer's tensors are of this architecture and no other. None for layers as GPT-NeoX's own, which
    no other claims."""

    take_apart: Callable[[NeoxTensors, ModelConfig, GroupedRows | None], NeoxTensors] = lambda tensors, model, rows: (
        tensors
    )
    """Takes tensors apart that hold several parameters of ours, for the configured model. Raises ConfigError where the
    order of the rows has to be given and is None."""

    renamed: tuple[tuple[str, str], ...] = ()
    """Pattern in our names, and its replacement in NeoX's, where the two differ."""

    also_read: tuple[tuple[str, str], ...] = ()
    """Beginning of a name in other versions of NeoX, and the usual one."""

    row_biases: tuple[str, ...] = ()
    """Ends of the names of the biases of row-parallel matrices."""

    row_biases_are_summed: Callable[[ModelConfig], bool] = lambda model: False
    """Tells whether each tensor-parallel rank adds a row bias of its own, so that the model's is their sum; elsewhere
    they are replicas."""


NEOX_ARCHITECTURES: Registry[NeoxArchitecture] = Registry(
    "architecture of NeoX's checkpoints", package="megatron.checkpointing.convert.neox.architectures"
)
