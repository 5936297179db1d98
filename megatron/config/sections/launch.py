"""How deepy.py starts the ranks."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from megatron.config.sections.section import Section


class LaunchConfig(Section):
    """Ranks on this machine, and where they meet. Ranks started by torchrun, srun or mpirun ignore these."""

    num_gpus: PositiveInt | None = None
    """Ranks that deepy.py starts on this machine [ranks]; None means every visible GPU, or one rank on a CPU."""

    master_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on which the ranks meet; None picks a free one."""
