"""Progress of a run, apart from weights and optimizer state."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from megatron.checkpointing.store.manifest import NO_OTHERS, Count, Size, describe_problem
from megatron.config.sections.growth import GrowthRecord
from megatron.errors import CheckpointError
from megatron.io.durable import write_durably
from megatron.io.json_files import read_json_object

STATE_FILE = "state.json"
STATE_FORMAT = 2


@dataclass(frozen=True)
class RunState:
    """Everything that a run must know to go on exactly.

    Dropout needs no generator state: it follows from seed, step and rank.
    """

    __pydantic_config__ = NO_OTHERS

    iteration: Count
    """Optimizer steps done [steps]."""

    consumed_train_samples: Count
    """Training samples read by all ranks together [samples]. With the index below it decides the epoch as well."""

    consumed_valid_samples: Count
    """Validation samples read by all ranks together [samples]."""

    schedule_steps: Count
    """Steps of the learning-rate schedule that are done; a step that was left out is none [steps]."""

    non_finite_steps: Count
    """Steps left out or rolled back so far because of NaN or infinity [steps]."""

    train_index_samples: Count
    """Samples that the training index was built for. The order depends on it, so a resumed run builds the same index
    whatever its train_iters [samples]."""

    valid_index_samples: Count
    """The same for validation [samples]."""

    data_fingerprint: dict[str, str]
    """What decides the tokens of every step, by configuration key (megatron/data/data_fingerprint.py)."""

    tensor_parallel_size: Size
    """Tensor-parallel ranks that wrote the checkpoint."""

    pipe_parallel_size: Size
    """Pipeline stages that wrote the checkpoint."""

    data_parallel_size: Size
    """Data-parallel ranks that wrote the checkpoint."""

    vocab_size: Size
    """Tokens that the tokenizer knows."""

    padded_vocab_size: Size
    """Rows of the embedding."""

    training_flops: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 0.0
    """Floating-point operations of all training so far, over resumes and growth, the smaller models' included [FLOP].
    Unknown to checkpoints of earlier versions, which count from 0."""

    growth: tuple[GrowthRecord, ...] = ()
    """Growths of the model so far, the first one first."""

    teacher: str | None = None
    """SHA-256 of the teacher that the run is distilled from; None without one."""


_STATE = TypeAdapter(RunState)


def write_state(folder: Path, state: RunState) -> None:
    """Writes state.json."""
    growth = [record.model_dump(mode="json") for record in state.growth]
    values = {"format": STATE_FORMAT, **asdict(state), "growth": growth}
    if state.teacher is None:
        # As it was before there were teachers, so that older versions read it.
        del values["teacher"]
    write_durably(folder / STATE_FILE, json.dumps(values, indent=1) + "\n")


def read_state(folder: Path) -> RunState:
    """Reads state.json. Raises CheckpointError when it is missing, damaged or of another format."""
    path = folder / STATE_FILE
    try:
        state = read_json_object(path)
        if state.pop("format", None) != STATE_FORMAT:
            raise CheckpointError(f"{path}: written in another format than {STATE_FORMAT}")
        return _STATE.validate_json(json.dumps(state))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {describe_problem(error)}") from error
