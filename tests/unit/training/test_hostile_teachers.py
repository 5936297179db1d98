"""Damaged and hostile folders as teachers and as models to measure: a typed error that names them, or read as they are.

Accepted: what transformers reads without complaint. A folder carries no checksum: other numbers in it, and settings
that are still those of a model, are another model as far as anybody can tell.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.load_config import load_config
from megatron.training.check_config import require_trainable
from tests.helpers.configs import TOKENFORMER
from tests.helpers.mutations import Findings, damaged_bytes, damaged_json, settings_of
from tools.analysis import measure_attention as tool

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@st.composite
def changes(draw: st.DrawFn, folder: Path) -> tuple[str, bytes]:
    """One of the folder's files, and its new content."""
    name = draw(st.sampled_from(FILES))
    content = (folder / name).read_bytes()
    damage = damaged_bytes(content)
    return name, draw(damage | damaged_json(json.loads(content)) if name.endswith(".json") else damage)


def as_teacher(folder: Path, work: Path, write_config: Callable[..., Path]) -> Any:
    return require_trainable(load_config([write_config(TOKENFORMER, distillation={"teacher": str(folder)})]))


def as_measured(folder: Path, work: Path, write_config: Callable[..., Path]) -> Any:
    (work / "text.txt").write_text("All happy families are alike. " * 4)
    args = tool.parse_args([str(folder), "--text", str(work / "text.txt"), "--output", str(work / "out"),
                            "--sequences", "4", "--length", "16"])  # fmt: skip
    return list(tool.measure(folder, args))


@pytest.mark.parametrize("read", [as_teacher, as_measured])
@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=pytest.mark.full)])
def test_damaged_folders(
    examples: int, read: Callable[..., Any], exported: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    folder, found = tmp_path / "hf", Findings()

    @settings_of(examples)
    @given(changes(exported))
    def check(change: tuple[str, bytes]) -> None:
        name, content = change
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        (folder / name).write_bytes(content)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            got = found.read(lambda: read(folder, tmp_path, write_config), tmp_path)
        if got is not None:
            found.accept(name)

    logging.disable(logging.WARNING)
    try:
        check()
    finally:
        logging.disable(logging.NOTSET)
    found.report()
