"""Progress and metrics: what a run shows and records."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.bounds import StepCount
from megatron.config.local_path import PathText
from megatron.config.section import Key, Section

Name = Annotated[str, Field(max_length=128)]
"""What W&B can name a thing."""


class WandbConfig(Section):
    """Weights & Biases. The API key comes from the environment or netrc, never from a configuration."""

    key_prefix = "wandb_"

    enabled: Annotated[bool, Key("use_wandb")] = False
    """Record to W&B."""

    project: Name = "neox"
    """Project that the run belongs to."""

    group: Annotated[Name | None, Key(difference="taken as it is; NeoX appends a random suffix")] = None
    """Group of runs."""

    team: Name | None = None
    """Team (entity) that owns the project."""

    host: Annotated[str | None, Key(difference="NeoX's default is https://api.wandb.ai")] = None
    """Base URL of the server; None means W&B's own or what the environment says."""

    run_name: Name | None = None
    """Name of the run; None lets W&B choose one."""


class ProfileConfig(Section):
    """Traces of a few steps, one file for each rank, in the folder `profile` of the run's folder."""

    key_prefix = "profile_"

    enabled: Annotated[bool, Key("profile", difference="writes traces of its own; NeoX's go to tensorboard_dir")] = (
        False
    )
    """Write torch's trace of some steps, for Perfetto or chrome://tracing. On a GPU, NVTX ranges and CUDA's calls to
    start and stop a profiler are made too, for `nsys profile --capture-range=cudaProfilerApi`."""

    step_start: StepCount = 10
    """First step that is profiled [steps]."""

    step_stop: Annotated[StepCount, Key(difference="the last step that is profiled")] = 12
    """Last step that is profiled [steps]."""

    memory: Annotated[bool, Key("memory_profiling", difference="for the steps of profile, into their folder")] = False
    """On a GPU, write a snapshot of the allocator's history over these steps too, for pytorch.org/memory_viz."""


class CommsLoggerConfig(Section):
    """A table of what a rank sends in a step."""

    key_prefix = "comms_logger."

    enabled: Annotated[bool, Key(difference="one table in the log, by operation and ranks; DeepSpeed's key")] = False
    """Log a table of collectives and pipeline transfers per step: calls, bytes and time. At the first progress line
    after the first step, and at the end of the run."""


class MonitorConfig(Section):
    """Progress and metrics: what a run shows and records."""

    log_interval: StepCount = 100
    """Steps between progress lines and metric records [steps]."""

    log_part_times: Annotated[bool, Key(difference="not a NeoX key")] = False
    """Record how long the parts of a step take, mean over the ranks, as time/data, time/forward, time/backward,
    time/transfer, time/reduce, time/step and time/save [s per step]."""

    profile: ProfileConfig = ProfileConfig()
    """Traces."""

    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    """Table of communication."""

    log_batch_hashes: Annotated[bool, Key(difference="not a NeoX key")] = False
    """Write the hash of each step's tokens to batch_hashes.jsonl in the run's folder."""

    log_dir: Annotated[PathText | None, Key(difference="the folder of metrics.jsonl; NeoX copies its output there")] = (
        None
    )
    """The run's folder, where metrics.jsonl is written; None means the checkpoint folder `save`, or runs/<name of the
    first YAML>."""

    tensorboard_dir: PathText | None = None
    """Folder for TensorBoard event files; None writes none."""

    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
