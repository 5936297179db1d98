"""Kernels that a YAML names: unknown and impossible choices are refused, with file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load_config import load_config
from megatron.errors import ConfigError
from tests.helpers.configs import PYTHIA, TOKENFORMER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattention": "cuda"}, "pattention: cuda: expected one of auto, compile, eager, reference, triton"),
        ({"rotary": "none"}, "rotary: none: expected one of auto, eager, reference, triton"),
        ({"pattention": "reference", "model_parallel_size": 2}, "needs all parameter tokens on one rank"),
        ({"pattention": "reference", "recompute_scores": True}, "the reference keeps all its scores"),
        (PYTHIA | {"pattention": "eager"}, "architecture gpt_neox has no Pattention"),
        (PYTHIA | {"recompute_scores": True}, "architecture gpt_neox has no Pattention"),
    ],
)
def test_choices_that_cannot_be_are_refused(
    write_config: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    base = {} if "architecture" in changes else TOKENFORMER
    with pytest.raises(ConfigError) as error:
        load_config([write_config(base | changes)])
    assert message in str(error.value)
    assert "tiny.yml:" in str(error.value)
