"""Training runs in all layouts. Each is trained when a test first asks for it, and read by all that ask afterwards.

Steps, batch and clipping are the same in all of them, and so is the learning rate at each step; what the runs differ in
must not show in their curves.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from torch import Tensor

from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER, layout_keys
from tests.helpers.covers import pairwise_cover
from tests.helpers.records import records
from tests.helpers.runs import Finished, run_ranks

STEPS, HALF, BATCH, CLIP = 20, 10, 8, 0.5
SAVED_STEPS = (0, 3, HALF, STEPS)
TOLERANCE = 1e-5
CURVES = ("train/lm_loss", "train/grad_norm", "train/learning_rate", "consumed_tokens", "train/skipped_steps")
BASES = {"tokenformer": TOKENFORMER, "pythia": PYTHIA, "gpt2": GPT2, "llama": LLAMA}
PAIRWISE = ("tokenformer", "pythia")
"""Models of which `make test` trains a pairwise cover of all cases; of the others it trains FEW."""
Layout = tuple[int, int, int]
LAYOUTS: list[Layout] = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
"""(tensor, pipe, data) parallel sizes."""
Curve = list[tuple[float, float]]
"""(loss, gradient norm before clipping) per step."""


@dataclass(frozen=True)
class Case:
    """A model in a layout, and how it computes there."""

    model: str
    layout: Layout
    tied: bool
    accumulation: int = 1
    recomputed: bool = False
    sequence_parallel: bool = False

    def __str__(self) -> str:
        words = [self.model, "tp{}-pp{}-dp{}".format(*self.layout), "tied" if self.tied else "untied"]
        words += [f"accumulate{self.accumulation}"] * (self.accumulation > 1)
        words += ["recomputed"] * self.recomputed + ["sequence"] * self.sequence_parallel
        return "-".join(words)

    def model_keys(self) -> dict[str, Any]:
        """Returns the YAML's keys of the model, for a run that goes on from this one."""
        shared = {"train_iters": STEPS, "gradient_clipping": CLIP}
        return BASES[self.model] | shared | {"no_weight_tying": not self.tied}

    def keys(self) -> dict[str, Any]:
        """Returns the YAML's keys. The global batch is the same in every layout."""
        choices = {"sequence_parallel": self.sequence_parallel, "checkpoint_activations": self.recomputed}
        return self.model_keys() | layout_keys(*self.layout, batch=BATCH, accumulation=self.accumulation) | choices

    @property
    def ranks(self) -> int:
        return math.prod(self.layout)

    @property
    def alone(self) -> Case:
        """The same model on one rank, without accumulation or recomputation: the reference of its layouts."""
        return Case(self.model, (1, 1, 1), self.tied)


ALL_CASES = [
    Case(*choices)
    for choices in product(BASES, LAYOUTS, [True, False], [1, 4], [False, True], [False, True])
    if not choices[-1] or choices[1][0] > 1
]
FEW = [
    Case("gpt2", (2, 2, 1), tied=True, accumulation=4, recomputed=True, sequence_parallel=True),
    Case("llama", (2, 2, 1), tied=False, accumulation=4, recomputed=True, sequence_parallel=True),
]
COVER = [*pairwise_cover([case for case in ALL_CASES if case.model in PAIRWISE], astuple), *FEW]
BF16_CASES = [
    Case(
        model,
        layout,
        tied=model not in ("pythia", "llama"),
        accumulation=1 if layout[0] > 1 else 4,
        sequence_parallel=layout[0] > 1,
    )
    for model, layout in product(BASES, LAYOUTS[1:])
]
BF16_COVER = [
    case
    for case in BF16_CASES
    if (case.model, case.layout)
    in {("tokenformer", (2, 2, 1)), ("tokenformer", (1, 2, 2)), ("pythia", (2, 1, 1)), ("pythia", (1, 1, 2))}
]


def case_with(layout: Layout, model: str, tied: bool) -> Case:
    """Returns the case of the cover with these choices, whatever its others are; without one, the plainest of all."""
    plainest = Case(model, layout, tied)
    found = (case for case in COVER if (case.layout, case.model, case.tied) == (layout, model, tied))
    return plainest if layout == (1, 1, 1) else next(found, plainest)


SPLIT = next(case for case in COVER if case.layout == (2, 1, 1) and case.model == "tokenformer")
"""A run of two tensor-parallel ranks, for tests that need any run in a layout that they can leave."""


@dataclass
class RankRecord:
    """What one rank held and read during a run."""

    tensor_rank: int
    pipe_rank: int
    data_rank: int
    split_dims: dict[str, int | None]
    """By the global name of each parameter on this rank."""
    first_weights: dict[str, Tensor]
    """Before the first step."""
    curve: Curve = field(default_factory=list)
    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Tokens [micro batch, seq_length + 1] of each micro batch that it read."""
    dropped: list[Tensor] = field(default_factory=list)
    """What every dropout of the residual stream returned, where there is any, in order."""
    last_weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer_elements: dict[str, int] = field(default_factory=dict)
    """Elements of its master weights, and of each moment of theirs."""


@dataclass(frozen=True)
class LayoutRun:
    """A finished run: its checkpoints of SAVED_STEPS and records in `folder`, and what its ranks saw."""

    folder: Path
    ranks: list[RankRecord]

    @property
    def curve(self) -> Curve:
        return self.ranks[0].curve

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"global_step{step}"


class LayoutRuns:
    """Runs in a folder, each trained once; tests read them, and change copies only.

    A conversion to the universal form is no change: it stays beside the checkpoint for the next run.
    """

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(dataset), "index_cache_dir": str(folder / "index")}
        self._trained: dict[Any, LayoutRun] = {}

    def config(self, name: str, keys: dict[str, Any]) -> Path:
        """Writes a configuration whose checkpoints and records go to the folder `name`."""
        config = self.folder / f"{name}.yml"
        config.write_text(yaml.safe_dump({"save": str(self.folder / name)} | self.data | keys))
        return config

    def trained(self, case: Case, **changes: Any) -> LayoutRun:
        """Returns the run of a case with other keys, on all of whose ranks losses and norms are alike."""
        key = (case, *sorted(changes.items()))
        if key not in self._trained:
            # Imports DeepSpeed.
            from tests.helpers.training import train_on_ranks

            name = "-".join([str(case), *(f"{key}={value}" for key, value in sorted(changes.items()))])
            config = self.config(name, case.keys() | {"extra_save_iters": list(SAVED_STEPS)} | changes)
            ranks = train_on_ranks(config, case.ranks)
            assert all(rank.curve == ranks[0].curve for rank in ranks), "losses and norms differ between ranks"
            self._trained[key] = LayoutRun(self.folder / name, ranks)
        return self._trained[key]

    def start(self, name: str, layout: Layout, keys: dict[str, Any], **more: Any) -> Finished:
        """Runs train.py in `layout` with the checkpoints and records in the folder `name`."""
        return run_ranks(self.config(name, keys | layout_keys(*layout)), ranks=math.prod(layout), **more)

    def curve_after_half(self, name: str, key: str = "train/lm_loss") -> dict[int, float]:
        """Returns what a run that went on from the first half recorded by step, which is all of the second half."""
        values = records(self.folder / name, key)
        assert list(values) == list(range(HALF + 1, STEPS + 1))
        return values

    def assert_continues(self, name: str, whole: LayoutRun, tolerance: float = TOLERANCE) -> None:
        """Compares the second half of `whole` with what `name` has recorded."""
        for key in (
            "train/lm_loss",
            "train/grad_norm",
            "train/learning_rate",
            "consumed_tokens",
            "train/skipped_steps",
        ):
            ours, theirs = self.curve_after_half(name, key), records(whole.folder, key)
            assert ours == pytest.approx({step: theirs[step] for step in ours}, abs=tolerance, rel=0), key
