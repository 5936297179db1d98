"""What eval.py measures with the Language Model Evaluation Harness, and where the results go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megatron.config.sections.section import Section

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class EvaluationConfig(Section):
    """Tasks of the harness (lm-eval), and which models are scored on them."""

    tasks: list[str] = Field(default=[])
    """Tasks, groups or tags of lm-eval, or paths of task YAMLs."""

    num_fewshot: NonNegativeInt | None = None
    """Solved examples before each question [examples]; None leaves it to each task. A task that fixes 0 keeps it."""

    task_limit: PositiveInt | Fraction | None = None
    """Documents of each task that are scored, as a number [documents] or, below 1, as a share; None scores all. For
    trials: what it gives is no result."""

    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Most sequences of a batch [sequences]; auto fills the memory, and takes less after it ran out."""

    include_path: str | None = None
    """Folder of further task YAMLs."""

    iterations: list[NonNegativeInt] | Literal["all"] = Field(default=[])
    """Steps of the checkpoints to score one after the other [steps]; none means the one that `iteration` names, or the
    newest."""

    output: str = "eval_results"
    """Folder of the results, or the .json file of a single one."""

    results_prefix: str = ""
    """Start of the results' file names."""

    cache: str | None = None
    """Folder of answers by checkpoint, so that an evaluation that was ended goes on where it was; None keeps none."""

    hf_model: str | None = None
    """Name or folder of a Hugging Face causal model to score instead of a checkpoint."""

    trust_remote_code: bool = False
    """Run the Python files that come with hf_model. They can do anything."""
