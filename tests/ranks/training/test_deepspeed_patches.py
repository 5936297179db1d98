"""Patches of DeepSpeed that show in a run's surroundings only; those of its numbers are in test_agreement.py."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import train


def refuse_old_names() -> None:
    warnings.simplefilter("error", FutureWarning)


def without_a_compiler(extensions: Path) -> None:
    os.environ |= {"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(extensions)}


def test_a_run_compiles_nothing_and_leaves_no_scripts(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(TOKENFORMER, train_iters=1)
    extensions = tmp_path / "extensions"
    train(config, before=without_a_compiler, arguments=(extensions,))
    assert not extensions.exists()
    run = config.with_suffix("")
    assert (run / "global_step1").is_dir()
    assert not list(run.rglob("*.py"))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_data_parallel_ranks_call_nothing_by_an_old_name(precision: str, write_config: Callable[..., Path]) -> None:
    train(write_config(TOKENFORMER, train_iters=1, precision=precision), ranks=2, before=refuse_old_names)
