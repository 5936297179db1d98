"""Damaged and hostile checkpoints: refused by a typed error that names them, or read as what they were.

Each file is read by `inspect_checkpoint.py --optimizer`, and what that takes for whole by `reshape.py`, which reads all
that training reads. What is accepted although it differs from the original is listed here:

SIZES     `verify_checkpoint: sizes` compares no content: numbers of tensors may differ where the size does not.
RESEALED  A writer who makes the manifest anew makes another checkpoint: nothing can tell it from one that was meant,
          but nothing in it runs, and its tensors are those of its configuration.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_zero_files import COUNTERS, EngineState
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.config.sections.run_config import RunConfig
from tests.helpers.checkpoints import reseal
from tests.helpers.hostile_pickles import hostile_archives, saved
from tests.helpers.mutations import FileContent, Findings, damaged_bytes, damaged_json, damaged_structure, settings_of
from tests.helpers.tiny_checkpoints import MODELS, VOCAB, read_run, whole_model, write_yaml
from tools.ckpts import inspect_checkpoint, reshape

JSON_FILES = ("manifest.json", "state.json", "config.json")
RESEALED = "another checkpoint, resealed"
SIZES = "other numbers, of which `sizes` looks at none"
LEAVES = (
    None, -1, 0, 10**18, 2.5, True, "x", b"x", [], {}, (), float("inf"), torch.zeros(3), torch.zeros(0),
    torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64),
    torch.zeros((), dtype=torch.int8), torch.zeros(7, 7), torch.empty(10**6, 10**6, device="meta"),
)  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Pythia's checkpoint with the optimizer's state, of two tensor-parallel and two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("original")
    run = read_run(write_yaml(folder, MODELS["pythia"]))
    counters = dict.fromkeys(COUNTERS, 0)
    groups = {"weight_decay": {"lr": 0.1}, "no_weight_decay": {"lr": 0.1}}
    engine = EngineState(counters, run.training.precision.dtype, groups, clip_grad=1.0, loss_scale={})
    state = replace(RunHeader.new(VOCAB.actual, {}).state, iteration=7)
    header = RunHeader(state, "run", {}, engine)
    return write_states(_layers(run), run, ParallelSizes(tensor=2, data=2), folder / "run", header)


def _layers(run: RunConfig) -> Iterator[LayerState]:
    weights = whole_model(run).state_dict()
    for layout in layer_layouts(run.model, VOCAB):
        own = {local: weights[layout.global_name(local)] for local in layout.parameters}
        moments = {local: {"exp_avg": weight * 0.5, "exp_avg_sq": weight**2} for local, weight in own.items()}
        parameters = {
            local: ParameterState(weight, weight.float(), moments[local], 7.0) for local, weight in own.items()
        }
        yield LayerState(layout.name, parameters)


def inspected(path: Path, level: str) -> dict[str, Any] | None:
    """What `inspect_checkpoint.py` prints, without sizes of files; None where it has found damage."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = inspect_checkpoint.main([str(path), "--optimizer", "--json", "--verify", level])
        if code == 0:
            words = [str(path.parents[1] / "run.yml"), "load=null", f"verify_checkpoint={level}"]
            reshape.main(
                ["--input_dir", str(path), "--config_file", *words, "--output_dir", str(path.parents[1] / "reshaped")]
            )
    report: dict[str, Any] = json.loads(printed.getvalue().partition(f"\n{path.parents[1] / 'reshaped'}")[0])
    assert (code == 1) == bool(report["problems"])
    unlike = ("path", "bytes", "bytes_of_weights", "verified")
    return {key: value for key, value in report.items() if key not in unlike} if code == 0 else None


@st.composite
def changes(draw: st.DrawFn, original: Path, trace: Path) -> tuple[str, bytes, bool]:
    """A file's name, its new content, and whether the manifest is made anew."""
    tensors = st.sampled_from(sorted(path.name for path in original.glob("*.pt")))
    kind = draw(st.sampled_from(["bytes", "bytes", "json", "json", "archive", "structure"]))
    name = draw(st.sampled_from(JSON_FILES) if kind == "json" else tensors)
    content = (original / name).read_bytes()
    if kind == "json":
        return name, draw(damaged_json(json.loads(content)) | damaged_bytes(content)), draw(st.booleans())
    if kind == "bytes":
        return name, draw(damaged_bytes(content)), draw(st.booleans())
    if kind == "archive":
        return name, draw(hostile_archives(content, trace)), True
    structure = draw(damaged_structure(load_tensors(original / name, mmap=False), LEAVES))
    return name, FileContent(saved(structure)), True


@pytest.mark.parametrize("examples", [25, pytest.param(500, marks=[pytest.mark.full, pytest.mark.timeout(1800)])])
def test_damaged_checkpoints(examples: int, original: Path, tmp_path: Path) -> None:
    trace, path = tmp_path / "exploded", tmp_path / "run" / original.name
    shutil.copy(original.parents[1] / "run.yml", tmp_path)
    shutil.copytree(original, path)
    expected, found = inspected(path, "full"), Findings()
    assert expected is not None and expected["parameters"] > 0

    @settings_of(examples)
    @given(changes(original, trace), st.sampled_from(["full", "sizes"]))
    def read(change: tuple[str, bytes, bool], level: str) -> None:
        name, content, anew = change
        for folder in (path, tmp_path / "reshaped"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, path)
        (path / name).write_bytes(content)
        if anew:
            try:
                reseal(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                anew = False  # no manifest any more
        refusals = found.counts["refused"]
        report = found.read(lambda: inspected(path, level), path)
        if found.counts["refused"] > refusals:
            return
        if report is None:
            found.accept("found damaged")
        elif report == expected:
            found.accept("read as it was")
        elif anew:
            found.accept(RESEALED)
        else:
            assert level == "sizes" and len(content) == (original / name).stat().st_size and name.endswith(".pt")
            found.accept(SIZES)
        assert not trace.exists()

    read()
    found.report()
