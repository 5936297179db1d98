"""A killed process loses no row of its records."""

import subprocess
import sys
from pathlib import Path

from megatron.monitor.metrics_file import read_records


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, sys; from pathlib import Path; from megatron.monitor.writers.jsonl import JsonlWriter\n"
        "writer = JsonlWriter.start(Path(sys.argv[1]))\n"
        "for step in range(1, 4): writer.write(step, {'train/lm_loss': 1.0})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]
