"""Standard errors by resampling are lm-eval's own, drawn without a fork of a process that has threads."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any, NoReturn

import pytest
from lm_eval.api import metrics

from megatron.inference.evaluation.harness import resampling


def refuse(*_: Any, **__: Any) -> NoReturn:
    pytest.fail("this process is forked")


@pytest.mark.parametrize("quick_draws", [10**9, pytest.param(0, marks=pytest.mark.full)])
def test_the_numbers_are_lm_evals(quick_draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(number**2 % 17) for number in range(50)]
    expected = metrics.bootstrap_stderr(metrics.mean, values, 3000)
    monkeypatch.setattr(resampling, "QUICK_DRAWS", quick_draws)
    monkeypatch.setattr(multiprocessing, "Pool", refuse)

    with resampling.without_forks():
        error = metrics.stderr_for_metric(metrics.perplexity, 3000)
        assert metrics.bootstrap_stderr(metrics.mean, values, 3000) == expected
        assert error is not None and error([-1.0, -2.0, -4.0]) > 0

    assert metrics.bootstrap_stderr.__module__ == metrics.__name__
    assert resampling.ALONE not in os.environ
