"""The one table from flat NeoX keys to the sections.

It knows every argument of gpt-neox and of the TokenFormer release, the keys of DeepSpeed's dictionaries that their
YAMLs use (as dotted names), and this project's own keys. Keys that the sections declare come from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron.config.neox.keys.data import DATA_KEYS
from megatron.config.neox.keys.model import MODEL_KEYS
from megatron.config.neox.keys.output import CHECKPOINT_KEYS, GENERATION_KEYS, MONITOR_KEYS
from megatron.config.neox.keys.parallel import LAUNCH_KEYS, PARALLEL_KEYS
from megatron.config.neox.keys.training import TRAINING_KEYS
from megatron.config.neox_entries import Conversion, Entry, MapsTo, TableEntry
from megatron.config.optimizer import OptimizerFacts, registered_optimizers
from megatron.config.sections.section_fields import Field, fields

OTHER_KEYS: Mapping[str, Mapping[str, TableEntry]] = {
    "model": MODEL_KEYS,
    "training": TRAINING_KEYS,
    "data": DATA_KEYS,
    "checkpoint": CHECKPOINT_KEYS,
    "monitor": MONITOR_KEYS,
    "generation": GENERATION_KEYS,
    "parallel": PARALLEL_KEYS,
    "launch": LAUNCH_KEYS,
}
"""What is said of keys beside the sections, by the section that they belong to."""

OPTIMIZER_PARAMS = "optimizer.params."
"""NeoX's dictionary of the values that an optimizer has of its own."""


EXTRA_ARGS = "deepspeed_extra_args."
"""NeoX's dictionary whose keys go to DeepSpeed beside those that stand at the top."""

_DEEPSPEED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "amp", "data_types", "communication_data_type", "fp32_allreduce"),
    *("prescale_gradients", "gradient_predivide_factor", "sparse_gradients", "zero_optimization"),
    *("optimizer", "scheduler", "activation_checkpointing", "checkpoint", "sparse_attention", "compression_training"),
    *("autotuning", "curriculum_learning", "data_efficiency", "elasticity"),
    *("comms_logger", "csv_monitor", "tensorboard", "wandb", "flops_profiler"),
    *("steps_per_print", "wall_clock_breakdown", "dump_state"),
}
"""Keys that DeepSpeed reads itself, and that mean the same in `deepspeed_extra_args`."""


def neox_keys(optimizer: OptimizerFacts[Any] | None = None) -> Mapping[str, Entry]:
    """Returns the table. It has the keys of every registered optimizer, or of `optimizer` alone."""
    return _table(registered_optimizers() if optimizer is None else (optimizer,))


def is_dictionary(key: str) -> bool:
    """Tells whether the table knows keys of a dictionary, such as `optimizer` and `optimizer.params`."""
    return key == EXTRA_ARGS[:-1] or without_extra_args(key) in nested_keys()


def nested_keys() -> frozenset[str]:
    """Returns the dictionaries whose keys the table knows."""
    return _dictionaries(registered_optimizers())


def is_known(key: str) -> bool:
    """Tells whether the table has a key, or keys in it."""
    return without_extra_args(key) in neox_keys() or is_dictionary(key)


def without_extra_args(key: str) -> str:
    """Returns the key that one in `deepspeed_extra_args` means."""
    own = key.removeprefix(EXTRA_ARGS)
    return own if own.partition(".")[0] in _DEEPSPEED_KEYS else key


def find_entry(key: str, optimizer: OptimizerFacts[Any] | None = None) -> Entry | None:
    """Returns what the table says of a key, or of the nearest dictionary around it."""
    table = neox_keys(optimizer)
    key = without_extra_args(key)
    while key not in table:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return None
    return table[key]


def key_of(path: str) -> str:
    """Returns the key that sets the value at a dotted path of the sections."""
    return fields()[path].key


def mapped_keys() -> list[str]:
    """Lists the keys worth suggesting: those that set a value, and the dictionaries around them."""
    keys = [key for key, entry in neox_keys().items() if isinstance(entry, MapsTo)]
    return keys + sorted({key.rpartition(".")[0] for key in keys if "." in key})


@cache
def _table(optimizers: tuple[OptimizerFacts[Any], ...]) -> Mapping[str, Entry]:
    table: dict[str, Entry] = {}
    conversions: dict[str, Conversion] = {}
    for keys in OTHER_KEYS.values():
        for key, entry in keys.items():
            if isinstance(entry, Conversion):
                conversions[key] = entry
            else:
                table[key] = entry
    for optimizer in optimizers:
        table |= {OPTIMIZER_PARAMS + name: entry for name, entry in optimizer.neox_keys.items()}
    # These come last: what one optimizer refuses, another may have.
    for optimizer in reversed(optimizers):
        for field in fields(optimizer.section).values():
            table[field.key] = _declared(field, conversions.get(field.key))
    return table


def _declared(field: Field, conversion: Conversion | None) -> MapsTo:
    if conversion is None:
        return MapsTo(field.path, difference=field.difference, default=field.key_default)
    return MapsTo(
        field.path, conversion.convert, conversion.accepts, field.difference, conversion.meaning, conversion.default
    )


@cache
def _dictionaries(optimizers: tuple[OptimizerFacts[Any], ...]) -> frozenset[str]:
    return frozenset(name for key in _table(optimizers) for name in _dictionaries_around(key))


def _dictionaries_around(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
