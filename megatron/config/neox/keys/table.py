"""The one table from flat NeoX keys to the sections.

It knows every argument of gpt-neox and of the TokenFormer release, the keys of DeepSpeed's dictionaries that their
YAMLs use (as dotted names), and this project's own keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron.config.neox.keys.data import DATA_KEYS
from megatron.config.neox.keys.entries import Entry, MapsTo
from megatron.config.neox.keys.model import MODEL_KEYS
from megatron.config.neox.keys.output import OUTPUT_KEYS
from megatron.config.neox.keys.parallel import LAUNCH_KEYS, PARALLEL_KEYS
from megatron.config.neox.keys.speedups import SPEEDUP_KEYS
from megatron.config.neox.keys.training import TRAINING_KEYS
from megatron.config.optimizer import OptimizerConfig, OptimizerFacts, registered_optimizers

OPTIMIZER_PARAMS = "optimizer.params."
"""NeoX's dictionary of the values that an optimizer has of its own."""

_SHARED_KEYS: Mapping[str, Entry] = {
    **MODEL_KEYS,
    **TRAINING_KEYS,
    **DATA_KEYS,
    **OUTPUT_KEYS,
    **PARALLEL_KEYS,
    **LAUNCH_KEYS,
    **SPEEDUP_KEYS,
}


def neox_keys(optimizer: OptimizerFacts[Any] | None = None) -> Mapping[str, Entry]:
    """Returns the table. It has the keys of every registered optimizer, or of `optimizer` alone."""
    return _table(registered_optimizers() if optimizer is None else (optimizer,))


def optimizer_keys(optimizer: OptimizerFacts[Any]) -> dict[str, Entry]:
    """Returns the keys under `optimizer.params` that one optimizer has of its own."""
    own = [name for name in optimizer.section.model_fields if name not in OptimizerConfig.model_fields]
    keys: dict[str, Entry] = {OPTIMIZER_PARAMS + name: MapsTo(f"training.optimizer.{name}") for name in own}
    return keys | {OPTIMIZER_PARAMS + name: entry for name, entry in optimizer.neox_keys.items()}


def nested_keys() -> frozenset[str]:
    """Returns the dictionaries whose keys the table knows, such as `optimizer` and `optimizer.params`."""
    return _dictionaries(registered_optimizers())


def find_entry(key: str, optimizer: OptimizerFacts[Any] | None = None) -> Entry | None:
    """Returns what the table says of a key, or of the nearest dictionary around it."""
    table = neox_keys(optimizer)
    while key not in table:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return table[key]


def key_of(path: str) -> str:
    """Returns the first key in the table that sets the value at a dotted path of the sections."""
    return next(key for key, entry in neox_keys().items() if isinstance(entry, MapsTo) and entry.path == path)


def mapped_keys() -> list[str]:
    """Lists the keys worth suggesting: those that set a value, and the dictionaries around them."""
    keys = [key for key, entry in neox_keys().items() if isinstance(entry, MapsTo)]
    return keys + sorted({key.rpartition(".")[0] for key in keys if "." in key})


@cache
def _table(optimizers: tuple[OptimizerFacts[Any], ...]) -> Mapping[str, Entry]:
    table = dict(_SHARED_KEYS)
    for optimizer in optimizers:
        keys = optimizer_keys(optimizer)
        # What one optimizer refuses, another may have.
        table |= {key: entry for key, entry in keys.items() if isinstance(entry, MapsTo) or key not in table}
    return table


@cache
def _dictionaries(optimizers: tuple[OptimizerFacts[Any], ...]) -> frozenset[str]:
    return frozenset(name for key in _table(optimizers) for name in _dictionaries_around(key))


def _dictionaries_around(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
