"""Evaluation by eval.py with the Language Model Evaluation Harness, and its results."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import Count, SampleCount, StepNumber
from megatron.config.local_path import NameOrPath, PathText
from megatron.config.section import Key, Section

FewShot = Annotated[int, Field(ge=0, le=10_000)]
Resamples = Annotated[int, Field(ge=2, le=10**7)]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class EvaluationConfig(Section):
    """Tasks of the harness (lm-eval), and which models are scored on them."""

    key_prefix = "eval_"

    tasks: list[NameOrPath] = Field(default=[])
    """Tasks, groups or tags of lm-eval, or paths of task YAMLs."""

    num_fewshot: Annotated[FewShot | None, Key(difference="a NeoX flag, not a key")] = None
    """Solved examples before each question [examples]; None leaves it to each task. A task that fixes 0 keeps it."""

    task_limit: Annotated[Count | Fraction | None, Key(difference="a NeoX flag, not a key")] = None
    """Documents of each task that are scored, as a number [documents] or, below 1, as a share; None scores all. For
    trials: what it gives is no result."""

    batch_size: Annotated[SampleCount | Literal["auto"], Key(difference="not a NeoX key; there, the micro batch")] = (
        "auto"
    )
    """Most sequences of a batch [sequences]; auto fills the memory, and takes less after it ran out."""

    include_path: Annotated[PathText | None, Key(difference="not a NeoX key")] = None
    """Folder of further task YAMLs. Those that run Python (`!function`) need eval_trust_remote_code."""

    iterations: Annotated[list[StepNumber] | Literal["all"], Key(difference="not a NeoX key")] = Field(default=[])
    """Steps of the checkpoints to score one after the other [steps]; none means the one that `iteration` names, or the
    newest."""

    log_samples: Annotated[bool, Key(difference="not a NeoX key")] = False
    """Write lm-eval's log of samples for each task, in a folder beside the results: documents, requests, answers."""

    bootstrap_iters: Annotated[Literal[0] | Annotated[int, Field(ge=2, le=10**7)], Key(difference="not a NeoX key")] = (
        100_000
    )
    """Resamples behind standard errors that have no formula [samples]; 0 gives none. Fewer are faster, and too few hide
    the tail of a metric such as perplexity."""

    output: Annotated[PathText, Key(difference="not a NeoX key; there, the current folder")] = "eval_results"
    """Folder of the results, or the .json file of a single one."""

    results_prefix: str = ""
    """Start of the results' file names."""

    cache: Annotated[PathText | None, Key(difference="not a NeoX key")] = None
    """Folder of answers by checkpoint, so that an evaluation that was ended goes on where it was; None keeps none."""

    hf_model: Annotated[NameOrPath | None, Key(difference="not a NeoX key")] = None
    """Name or folder of a Hugging Face causal model to score instead of a checkpoint."""

    trust_remote_code: Annotated[bool, Key(difference="not a NeoX key")] = False
    """Run the Python files that come with hf_model, or that task YAMLs of your own name. They can do anything."""
