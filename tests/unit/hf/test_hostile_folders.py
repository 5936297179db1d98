"""Damaged and hostile Hugging Face folders: refused by a typed error that names them, or imported.

Accepted: a folder whose weights transformers computes the same logits from as we do. That is what importing promises;
neither safetensors nor config.json carries a checksum, so other numbers, and settings that a run may choose freely
(dropout, initialization, longest context), make another model that was meant as far as anybody can tell.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers.hostile_pickles import hostile_archives
from tests.helpers.mutations import FileContent, Findings, damaged_bytes, damaged_json, settings_of
from tests.helpers.tiny_checkpoints import MODELS, export, make_checkpoint, write_yaml
from tools.ckpts import convert_hf_to_neox

FORMS = ("whole", "shards", "bin")


@pytest.fixture(scope="module", params=["l2_norm_gelu", pytest.param("gpt2", marks=pytest.mark.full)])
def originals(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's export in one file of safetensors, in shards with an index, and in a .bin."""
    folder = tmp_path_factory.mktemp("originals")
    checkpoint = make_checkpoint(write_yaml(folder, MODELS[request.param]))
    whole = export(checkpoint, folder / "whole")
    export(checkpoint, folder / "shards", max_shard_bytes=60_000)
    shutil.copytree(whole, folder / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    from safetensors.torch import load_file

    torch.save(load_file(whole / "model.safetensors"), folder / "bin" / "pytorch_model.bin")
    return folder


def weights_of(source: Path, config: list[str], output: Path) -> Mapping[str, Tensor]:
    """The weights that `convert_hf_to_neox.py` makes of a folder."""
    shutil.rmtree(output, ignore_errors=True)
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert_hf_to_neox.main(["--input_dir", str(source), *config, "--output_dir", str(output)])
    return read_weights(read_checkpoint(output / "global_step0"))


@st.composite
def changes(draw: st.DrawFn, originals: Path, trace: Path) -> tuple[str, str, bytes]:
    """A form, one of its files, and the file's new content."""
    form = draw(st.sampled_from(FORMS))
    weights = [path.name for path in (originals / form).iterdir() if path.suffix in (".safetensors", ".bin")]
    index = [path.name for path in (originals / form).glob("*.index.json")]
    name = draw(st.sampled_from(["config.json", "config.json", *index, *sorted(weights)]))
    content = (originals / form / name).read_bytes()
    damage = damaged_bytes(content)
    if name.endswith(".json"):
        damage |= damaged_json(json.loads(content))
    elif name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        damage |= damaged_json(json.loads(content[8 : 8 + size])).map(lambda head: _with_head(content, size, head))
    else:
        damage |= hostile_archives(content, trace)
    return form, name, draw(damage)


def _with_head(content: bytes, size: int, head: bytes) -> bytes:
    return FileContent(len(head).to_bytes(8, "little") + head + content[8 + size :])


@pytest.mark.parametrize("derived", [False, True], ids=["--config_file", "--write-config"])
@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.full)])
def test_damaged_folders(examples: int, derived: bool, originals: Path, tmp_path: Path) -> None:
    trace, folder = tmp_path / "exploded", tmp_path / "hf"
    expected = weights_of(originals / "whole", ["--config_file", str(originals / "run.yml")], tmp_path / "out")
    found = Findings()

    @settings_of(examples)
    @given(changes(originals, trace))
    def read(change: tuple[str, str, bytes]) -> None:
        form, name, content = change
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals / form, folder)
        (folder / name).write_bytes(content)
        (tmp_path / "new.yml").unlink(missing_ok=True)
        config = (
            ["--write-config", str(tmp_path / "new.yml")] if derived else ["--config_file", str(originals / "run.yml")]
        )
        got = found.read(lambda: weights_of(folder, config, tmp_path / "out"), tmp_path)
        assert not trace.exists()
        if got is None:
            return
        same = got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
        found.accept("same weights" if same else "other numbers")
        assert all(torch.isfinite(weight).all() for weight in got.values())

    logging.disable(logging.WARNING)
    try:
        read()
    finally:
        logging.disable(logging.NOTSET)
    found.report()
