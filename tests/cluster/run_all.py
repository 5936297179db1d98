"""Runs every check of real launchers: `make test-cluster`, or `make test-cluster ARGS="ssh slurm"` for some.

A check whose packages are missing, or that needs root, says so and does not run; the exit code is then 3.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.launched_runs import NOT_RUN


def main(names: Sequence[str]) -> int:
    """Runs the checks, each in a process of its own; returns 0 when all have passed."""
    known = sorted(file.stem.removeprefix("check_") for file in Path(__file__).parent.glob("check_*.py"))
    unknown = set(names) - set(known)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return 2
    codes = {}
    for name in names or known:
        codes[name] = subprocess.run([sys.executable, "-m", f"tests.cluster.check_{name}"], check=False).returncode
    words = {0: "passed", NOT_RUN: "not run"}
    print("; ".join(f"{name}: {words.get(code, 'FAILED')}" for name, code in codes.items()))
    return 1 if set(codes.values()) - set(words) else max(codes.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
