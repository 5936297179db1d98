"""What a run leaves behind: checkpoints, metrics, logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron.config.section import Section


class CheckpointConfig(Section):
    """When and where checkpoints are written and read."""

    save: str | None = None
    """Folder for this run's checkpoints; None saves nothing."""

    load: str | None = None
    """Folder to load from; it must hold a checkpoint."""

    checkpoint_factor: PositiveInt | None = None
    """Steps between checkpoints (linear) or ratio between them (log)."""

    checkpoint_scale: Literal["linear", "log"] = "linear"
    """Whether checkpoints are evenly or exponentially spaced."""

    extra_save_iters: list[NonNegativeInt] = Field(default=[])
    """Further steps at which to save; 0 saves the initial weights."""

    keep_last_n_checkpoints: PositiveInt | None = None
    """Checkpoints kept; None keeps all."""


class MonitorConfig(Section):
    """What is shown and recorded while a run goes on."""

    log_interval: PositiveInt = 100
    """Steps between progress lines and metric records [steps]."""

    log_dir: str | None = None
    """The run's folder, where metrics.jsonl is written; None means the checkpoint folder `save`, or runs/<name of the
    first YAML>."""
