"""Optional speed-ups: this project's own keys."""

from __future__ import annotations

from megatron.config.neox.keys.entries import Entry, MapsTo
from megatron.config.sections.speedups import SpeedupsConfig

_NOT_IN_NEOX = "not a NeoX key"

SPEEDUP_KEYS: dict[str, Entry] = {
    name: MapsTo(f"speedups.{name}", difference=_NOT_IN_NEOX) for name in SpeedupsConfig.model_fields
}
