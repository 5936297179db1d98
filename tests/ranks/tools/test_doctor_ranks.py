"""The doctor under a launcher: it measures what ranks send each other, and sees what arrives changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor, distributed

from tests.helpers.distributed import run_distributed
from tests.helpers.forkserver import ENVIRONMENT, ROOT
from tools import doctor_ranks
from tools.doctor_machine import Finding


def _findings(fault: str) -> list[Finding]:
    doctor_ranks.LARGE, doctor_ranks.TRIES = 1 << 16, 2
    receive, reduce = distributed.recv, distributed.all_reduce

    def changed(tensor: Tensor, *arguments: int) -> None:
        receive(tensor, *arguments)
        tensor[0] += 1

    def lossy(tensor: Tensor) -> None:
        reduce(tensor)
        tensor[-1] -= 1

    with (
        mock.patch.object(distributed, "recv", changed if fault == "transfer" else receive),
        mock.patch.object(distributed, "all_reduce", lossy if fault == "sum" else reduce),
    ):
        return doctor_ranks.rank_findings(f"host{distributed.get_rank()}")


@pytest.mark.parametrize(
    ("fault", "texts"),
    [
        ("", ["2 ranks on 2 machines, backend gloo", "all-reduce of 0 MiB: ", "point-to-point: "]),
        ("sum", ["2 ranks on 2 machines", "an all-reduce is wrong on rank 0", "point-to-point: "]),
        ("transfer", ["2 ranks", "all-reduce", "what rank 0 sends to rank 1 arrives changed"]),
    ],
)
def test_two_ranks(fault: str, texts: list[str]) -> None:
    first, second = run_distributed(_findings, 2, fault)
    assert [finding.kind for finding in first] == [finding.kind for finding in second]
    assert all(text in finding.text for text, finding in zip(texts, first, strict=True)), first
    assert any(finding.kind == "wrong" for finding in first) == bool(fault)


@pytest.mark.full
def test_torchrun(tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "tools/doctor.py", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks on 1 machine, backend gloo" in done.stdout and "slowest: rank 0 (" in done.stdout
    assert done.stdout.count("versions   ok") == 1, "one report for the machine"
