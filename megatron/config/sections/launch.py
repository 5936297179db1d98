"""How deepy.py starts the ranks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from megatron.config.sections.section import Key, Section


class LaunchConfig(Section):
    """Ranks on this machine, and where they meet. Ranks started by torchrun, srun or mpirun ignore these."""

    num_gpus: Annotated[PositiveInt | None, Key(difference="ranks on this machine, also on CPUs")] = None
    """Ranks that deepy.py starts on this machine [ranks]; None means every visible GPU, or one rank on a CPU."""

    master_port: Annotated[int | None, Key(difference="a free port when unset; NeoX's default is 29500")] = Field(
        default=None, ge=1, le=65535
    )
    """Port on which the ranks meet; None picks a free one."""
