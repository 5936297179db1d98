"""What is shown and recorded while a run goes on."""

from __future__ import annotations

from pydantic import PositiveInt

from megatron.config.sections.section import Section


class WandbConfig(Section):
    """Weights & Biases. The API key comes from the environment or netrc, never from a configuration."""

    enabled: bool = False
    """Record to W&B."""

    project: str = "neox"
    """Project that the run belongs to."""

    group: str | None = None
    """Group of runs."""

    team: str | None = None
    """Team (entity) that owns the project."""

    host: str | None = None
    """Base URL of the server; None means W&B's own or what the environment says."""

    run_name: str | None = None
    """Name of the run; None lets W&B choose one."""


class MonitorConfig(Section):
    """What is shown and recorded while a run goes on."""

    log_interval: PositiveInt = 100
    """Steps between progress lines and metric records [steps]."""

    log_batch_hashes: bool = False
    """Write the hash of each step's tokens to batch_hashes.jsonl in the run's folder."""

    log_dir: str | None = None
    """The run's folder, where metrics.jsonl is written; None means the checkpoint folder `save`, or runs/<name of the
    first YAML>."""

    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files; None writes none."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
