"""Damaged and hostile NeoX checkpoints: refused by a typed error that names them, or imported.

Accepted, though the weights differ from the original's: other finite numbers of the same shapes and names. NeoX's files
carry no checksum. Nothing in them runs.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.safe_load import load_tensors
from tests.helpers.hostile_pickles import hostile_archives, saved
from tests.helpers.mutations import FileContent, Findings, damaged_bytes, damaged_structure, settings_of
from tests.helpers.neox_writer import MODELS, ROWS, imported, neox_weights, write_config, write_neox
from tests.unit.checkpointing.test_hostile_checkpoints import LEAVES

FORMS = ("layers", "ranks", "bin")
NUMBERS = "other numbers"
PACKED = "llama, as many heads"


@pytest.fixture(scope="module", params=["pythia", pytest.param(PACKED, marks=pytest.mark.full)])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keys of a Pythia, or of a LLaMA, whose tensors are taken apart."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def originals(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of two tensor-parallel ranks in NeoX's files, and of one in a .bin."""
    folder = tmp_path_factory.mktemp("originals")
    weights = neox_weights(settings, ROWS)
    for form in FORMS:
        write_neox(folder / form, weights, settings, form, tensor=1 if form == "bin" else 2)
    return folder


def weights_of(source: Path, config: Path, output: Path) -> Mapping[str, Tensor]:
    """The weights that `import_neox.py` makes of a folder."""
    shutil.rmtree(output, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return read_weights(imported(source, config, output))


@st.composite
def changes(draw: st.DrawFn, originals: Path, trace: Path) -> tuple[str, str, bytes]:
    """A form, the path of one of its files, and the file's new content; or the name that the file gets."""
    form = draw(st.sampled_from(FORMS))
    files = [path for path in (originals / form).rglob("*") if path.suffix in (".pt", ".bin")]
    file = draw(st.sampled_from(sorted(files)))
    content, name = file.read_bytes(), str(file.relative_to(originals / form))
    kind = draw(st.sampled_from(["bytes", "archive", "structure", "structure"]))
    if kind == "structure":
        structure = draw(damaged_structure(load_tensors(file, mmap=False), LEAVES))
        return form, name, FileContent(saved(structure, draw(st.booleans())))
    return form, name, draw(damaged_bytes(content) if kind == "bytes" else hostile_archives(content, trace))


@pytest.mark.parametrize("examples", [25, pytest.param(400, marks=pytest.mark.full)])
def test_damaged_neox_checkpoints(examples: int, settings: dict[str, Any], originals: Path, tmp_path: Path) -> None:
    trace, folder = tmp_path / "exploded", tmp_path / "neox"
    config, found = write_config(tmp_path, settings), Findings()
    expected = {form: weights_of(_given(originals / form, form), config, tmp_path / "out") for form in FORMS}

    @settings_of(examples)
    @given(changes(originals, trace))
    def read(change: tuple[str, str, bytes]) -> None:
        form, name, content = change
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals / form, folder)
        (folder / name).write_bytes(content)
        got = found.read(lambda: weights_of(_given(folder, form), config, tmp_path / "out"), folder)
        assert not trace.exists()
        if got is not None:
            assert {key: value.shape for key, value in got.items()} == {k: v.shape for k, v in expected[form].items()}
            same = all(torch.equal(value, expected[form][key]) for key, value in got.items())
            found.accept("read as it was" if same else NUMBERS)

    read()
    found.report()


@pytest.mark.parametrize(
    "name",
    [
        "layer_03-model_999999999-model_states.pt",
        "layer_999999999-model_00-model_states.pt",
        "mp_rank_77777_model_states.pt",
    ],
)
def test_a_number_in_a_file_s_name_is_not_counted_up_to(
    name: str, settings: dict[str, Any], originals: Path, tmp_path: Path
) -> None:
    form = "ranks" if name.startswith("mp_rank") else "layers"
    shutil.copytree(originals / form, tmp_path / "neox")
    source = _given(tmp_path / "neox", form)
    shutil.copy(next(source.glob("*.pt")), source / name)
    found = Findings()
    config = write_config(tmp_path, settings)
    assert found.read(lambda: weights_of(source, config, tmp_path / "out"), source) is None
    found.report()


def _given(folder: Path, form: str) -> Path:
    """The path that a user gives to the importer."""
    return folder / "global_step5" / ("pytorch_model.bin" if form == "bin" else "")
