"""Checkpoints: where they are written and read, when, and how they are checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import Count, StepCount, StepNumber
from megatron.config.local_path import PathOrUrl, PathText, SavePath, UrlText
from megatron.config.section import Key, Section

Ratio = Annotated[float, Field(gt=0.0, le=1e12)]
Verification = Literal["full", "sizes"]


class CheckpointConfig(Section):
    """Checkpoints: where they are written and read, when, and how they are checked."""

    save: SavePath | None = None
    """Folder for this run's checkpoints; None saves nothing."""

    save_remote: Annotated[UrlText | None, Key(difference="NeoX's s3_path sets it as well")] = None
    """URL to which every checkpoint in `save` is uploaded in the background, whole or not at all, such as
    s3://bucket/run, or any that fsspec knows; nothing is ever deleted there. `auto_resume` goes on from there on an
    empty disk. Credentials come from the environment."""

    remote_cache_dir: Annotated[PathText | None, Key(difference="not a NeoX key")] = None
    """Folder that keeps what is fetched for a URL in `load`; None means ~/.cache/megatron-tokenformer/checkpoints, or
    below XDG_CACHE_HOME."""

    load: Annotated[
        PathOrUrl | None,
        Key(difference="must hold a checkpoint unless it is save; NeoX always starts from step 0 without"),
    ] = None
    """Folder or URL to load from. It must hold a checkpoint, unless it is the folder `save`, in which a run starts
    fresh."""

    checkpoint_factor: StepCount | Ratio | None = None
    """Steps between checkpoints (linear, a whole number) or ratio between them (log, above 1); None saves only at
    extra_save_iters and at the end."""

    checkpoint_scale: Literal["linear", "log"] = "linear"
    """Whether checkpoints are evenly or exponentially spaced."""

    extra_save_iters: list[StepNumber] = Field(default=[])
    """Further steps at which to save [steps]; 0 saves the initial weights."""

    async_save: Annotated[bool, Key(difference="not a NeoX key; Megatron-LM has an option of this name")] = False
    """Write checkpoints in the background while training goes on, from a copy in host memory, which is as large as the
    files that a rank writes. Only the copying, and the last save of a run, are waited for."""

    keep_last_n_checkpoints: Count | None = None
    """Newest complete checkpoints of this run that are kept [checkpoints]; None keeps all."""

    keep_extra_save_iters: Annotated[bool, Key(difference="not a NeoX key")] = False
    """Keep the checkpoints of extra_save_iters for ever, whatever keep_last_n_checkpoints says."""

    keep_every_n_iters: Annotated[StepCount | None, Key(difference="not a NeoX key")] = None
    """Keep the checkpoint of every multiple of this step for ever [steps]; None keeps none for that reason."""

    verify_checkpoint: Annotated[Verification, Key(difference="not a NeoX key; there, nothing is checked")] = "full"
    """What is compared with the manifest before a checkpoint is loaded: sizes and SHA-256 of all files, or sizes."""

    allow_unsafe_load: Annotated[bool, Key(difference="not a NeoX key; there, every file is unpickled")] = False
    """Load .pt files that hold more than tensors and plain values. Such files can run any code."""

    allow_changed_data: Annotated[bool, Key(difference="not a NeoX key; there, nobody notices")] = False
    """Go on with a run although its datasets, tokenizer, seed or sequence length are not those of the checkpoint."""

    auto_resume: Annotated[bool, Key(difference="not a NeoX key; there, load equal to save")] = False
    """Continue from the newest complete checkpoint in `save`, or in `save_remote` where that has a newer one; without
    any, start from `load`, or fresh."""

    iteration: StepNumber | None = None
    """Step of the checkpoint to load [steps]; None means the newest complete one."""

    finetune: bool = False
    """Load weights alone and start at step 0: no optimizer state, schedule, random state or data position."""

    pretrain_partial_init: Annotated[PathText | None, Key(difference="TokenFormer release")] = None
    """Checkpoint folder of a TokenFormer with fewer parameter tokens, as the published growth runs start from: its
    tokens fill the first rows, the other rows keep their initial values, and everything else is copied. The run starts
    at step 0 with a fresh optimizer and schedule. The section grow has better rules."""

    no_load_optim: bool = False
    """Load everything but the optimizer state."""
