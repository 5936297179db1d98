"""DeepSpeed's own converter on our checkpoints, against our conversion of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.engine.universal import universal_form
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers.commands import run_command
from tests.helpers.layout_runs import HALF, SPLIT, Case, LayoutRuns, case_with

MORE = [
    case_with((2, 1, 1), "pythia", tied=False),
    case_with((2, 2, 1), "tokenformer", tied=True),
    case_with((1, 2, 2), "pythia", tied=True),
    case_with((2, 2, 1), "gpt2", tied=True),
    case_with((2, 2, 1), "llama", tied=False),
]


def converted(source: Path, output: Path) -> Path:
    """What `ds_to_universal.py` makes of a checkpoint."""
    folders = ["--input_folder", source, "--output_folder", output]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    finished = run_command(["-m", "deepspeed.checkpoint.ds_to_universal", *map(str, folders), *workers])
    assert finished.returncode == 0, finished.stderr
    return output


def assert_same_form(theirs: Path, ours: Path) -> None:
    files = sorted(path.relative_to(ours) for path in (ours / "zero").glob("*/*.pt"))
    assert files == sorted(path.relative_to(theirs) for path in (theirs / "zero").glob("*/*.pt"))
    assert len(files) > 40
    for file in files:
        want, got = torch.load(ours / file), torch.load(theirs / file, weights_only=False)
        if file.name == "step.pt":
            assert float(got) == float(want)
        else:
            assert torch.equal(got["param"], want["param"]), file


@pytest.mark.full
@pytest.mark.parametrize("case", [SPLIT, *MORE], ids=str)
def test_it_makes_what_our_conversion_makes(case: Case, layout_runs: LayoutRuns, tmp_path: Path) -> None:
    """test_reshape.py holds what `reshape.py` writes against the same files."""
    run = layout_runs.trained(case)
    trained = shutil.copytree(run.checkpoint(HALF), tmp_path / "run" / run.checkpoint(HALF).name,
                              ignore=shutil.ignore_patterns("universal*"))  # fmt: skip
    theirs = converted(trained, tmp_path / "theirs")
    ours = universal_form(read_checkpoint(trained), "full")
    assert_same_form(theirs, ours)
