"""Limits on the time that ranks wait for each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.bounds import NonNegative
from megatron.config.section import Key, Section


class WatchdogConfig(Section):
    """Hangs: how long ranks wait for each other, and from when on a step counts as one that will never end."""

    distributed_timeout_minutes: Annotated[
        float, Field(gt=0.0, le=100_000.0), Key(difference="Megatron-LM's key, not NeoX's")
    ] = 10.0
    """Time that a collective may take, on any rank and in any part of a run [minutes]. A rank that waits longer fails;
    at nine tenths of it, the run reports a hang and ends with exit code 76."""

    hang_factor: Annotated[NonNegative, Key(difference="not a NeoX key")] = 20.0
    """A step that takes this many times the median of the last 50 is a hang: stacks and collectives of all ranks are
    written, and the run ends with exit code 76. 0 switches the watchdog off."""

    hang_min_seconds: Annotated[NonNegative, Key(difference="not a NeoX key")] = 300.0
    """A step that takes less is no hang, whatever `hang_factor` says [s]."""
