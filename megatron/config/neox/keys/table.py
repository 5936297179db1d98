"""The one table from flat NeoX keys to the sections.

It knows every argument of gpt-neox and of the TokenFormer release, the keys of DeepSpeed's dictionaries that their
YAMLs use (as dotted names), and this project's own keys.
"""

from __future__ import annotations

from megatron.config.neox.keys.data import DATA_KEYS
from megatron.config.neox.keys.entries import Entry, MapsTo
from megatron.config.neox.keys.model import MODEL_KEYS
from megatron.config.neox.keys.output import OUTPUT_KEYS
from megatron.config.neox.keys.parallel import LAUNCH_KEYS, PARALLEL_KEYS
from megatron.config.neox.keys.speedups import SPEEDUP_KEYS
from megatron.config.neox.keys.training import TRAINING_KEYS

NEOX_KEYS: dict[str, Entry] = {
    **MODEL_KEYS,
    **TRAINING_KEYS,
    **DATA_KEYS,
    **OUTPUT_KEYS,
    **PARALLEL_KEYS,
    **LAUNCH_KEYS,
    **SPEEDUP_KEYS,
}


def _dictionaries_around(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


NESTED = frozenset(name for key in NEOX_KEYS for name in _dictionaries_around(key))
"""Dictionaries whose keys the table knows, such as `optimizer` and `optimizer.params`."""


def find_entry(key: str) -> Entry | None:
    """What the table says of a key, or of the nearest dictionary around it."""
    while key not in NEOX_KEYS:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return NEOX_KEYS[key]


def key_of(path: str) -> str:
    """The first key in the table that sets the value at a dotted path of the sections."""
    return next(key for key, entry in NEOX_KEYS.items() if isinstance(entry, MapsTo) and entry.path == path)


def mapped_keys() -> list[str]:
    """Keys worth suggesting: those that set a value, and the dictionaries around them."""
    keys = [key for key, entry in NEOX_KEYS.items() if isinstance(entry, MapsTo)]
    return keys + sorted({key.rpartition(".")[0] for key in keys if "." in key})
