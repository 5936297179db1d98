"""Loader workers leave signals to their parent, and end with it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from megatron.data.micro_batch import micro_batches
from tests.helpers.forkserver import ROOT
from tests.helpers.squares import Squares


def test_workers_survive_signals_to_the_process_group() -> None:
    others = multiprocessing.active_children()
    loader = micro_batches(Squares(50), consumed_samples=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=2)
    assert [int(next(loader)[0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid or 0, number)
    assert [int(next(loader)[0, 0]) for _ in range(20)] == list(range(4, 24))
    assert all(worker.is_alive() for worker in workers)
    loader.close()  # type: ignore[attr-defined]
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(
    "broken",
    [pytest.param(None, id="in between"), pytest.param(0, id="after an unexpected error", marks=pytest.mark.full)],
)
def test_process_ends_although_workers_ignore_signals(broken: int | None) -> None:
    """multiprocessing would wait for them for ever, so the loader ends them itself."""
    program = f"""
        from tests.helpers.squares import Squares
        from megatron.data.micro_batch import micro_batches
        batches = micro_batches(
            Squares(9, broken={broken}), consumed_samples=0, micro_batch_size=1, data_rank=0, data_size=1, num_workers=2
        )
        next(batches)
        raise SystemExit(3)
    """
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, timeout=60, check=False, capture_output=True
    )
    assert finished.returncode == (3 if broken is None else 1), finished.stderr
