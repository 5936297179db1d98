"""Norms of weights of any layout are those of the whole model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.tiny_checkpoints import make_checkpoint, read_run, whole_model, write_yaml
from tools.ckpts import inspect_checkpoint

Inspect = Callable[..., tuple[int, Any]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Inspect:
    """`inspect_checkpoint.py ARGUMENTS --json`: its exit code, and what it printed."""

    def run(*arguments: object) -> tuple[int, Any]:
        code = inspect_checkpoint.main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize(("tensor", "pipe"), [(1, 1), (2, 2)])
def test_norms_are_those_of_the_whole_model(tensor: int, pipe: int, tmp_path: Path, inspect: Inspect) -> None:
    config = write_yaml(tmp_path, TOKENFORMER)
    path = make_checkpoint(config, tensor=tensor, pipe=pipe).path
    code, report = inspect(path)
    assert code == 0
    assert report["state"]["iteration"] == 7 and report["layout"] == {"tensor": tensor, "pipe": pipe, "data": 1}
    model = whole_model(read_run(config))
    expected = {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}
    shown = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert shown.keys() == expected.keys()
    for name, array in expected.items():
        assert tuple(shown[name]["shape"]) == array.shape
        assert shown[name]["norm"] == pytest.approx(math.sqrt((array**2).sum()), rel=1e-12)
        assert shown[name]["largest"] == pytest.approx(np.abs(array).max(), rel=1e-12)
        assert (shown[name]["dtype"], shown[name]["not_finite"]) == ("float32", 0)
    assert report["parameters"] == sum(array.size for array in expected.values())
