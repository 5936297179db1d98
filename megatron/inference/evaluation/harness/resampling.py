"""Standard errors by resampling, as lm-eval draws them, without its forks of this process.

lm-eval forks a process for each core and ends them by signals. This one has threads of torch and of its process group,
and handlers of signals: a fork may wait for ever for a lock that a thread held. The numbers are the same whoever draws
them, because every chunk of resamples has a seed of its own.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api import metrics

ALONE = "DISABLE_MULTIPROC"
"""Variable that lets lm-eval draw in this process alone."""
QUICK_DRAWS = 50_000_000
"""Values that one core draws in about ten seconds; to start processes, which import lm-eval, takes as long."""


@contextmanager
def without_forks() -> Iterator[None]:
    """Draws few resamples in this process while the body runs, and many in processes that are started afresh."""
    drawn_by_lm_eval: Callable[..., float] = metrics.bootstrap_stderr
    metrics.bootstrap_stderr = _standard_error_by(drawn_by_lm_eval)
    try:
        yield
    finally:
        metrics.bootstrap_stderr = drawn_by_lm_eval


def _standard_error_by(drawn_by_lm_eval: Callable[..., float]) -> Callable[..., float]:
    def standard_error(f: Callable[[Sequence[Any]], float], xs: Sequence[Any], iters: int) -> float:
        forking = multiprocessing.Pool
        alone = os.environ.get(ALONE)
        multiprocessing.Pool = multiprocessing.get_context("forkserver").Pool
        if iters * len(xs) <= QUICK_DRAWS:
            os.environ[ALONE] = "1"
        try:
            return drawn_by_lm_eval(f, xs, iters)
        finally:
            multiprocessing.Pool = forking
            os.environ.pop(ALONE, None)
            if alone is not None:
                os.environ[ALONE] = alone

    return standard_error
