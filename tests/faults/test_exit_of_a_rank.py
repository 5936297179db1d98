"""The end of a rank: its exit code is the run's, whatever threads of libraries do meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import CheckpointError

SCRIPT = """
import atexit, socket, sys, threading, time
from torch import distributed
from megatron.errors import CheckpointError, exit_on_user_error

with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
store = distributed.TCPStore("127.0.0.1", port, 1, True)
second = store.clone()

def ask() -> None:
    while True:
        second.check(["never set"])

def main() -> int:
    threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.2)
    atexit.register(print, "registered for the exit")
    sys.stdout.write("of the body, ")
    {ending}

exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "says"),
    [
        ("return 75", 75, ""),
        pytest.param("return 0", 0, "", marks=pytest.mark.full),
        pytest.param("raise SystemExit(75)", 75, "", marks=pytest.mark.full),
        (
            "raise CheckpointError('of the checkpoint')",
            CheckpointError.exit_code,
            "CheckpointError: of the checkpoint\n",
        ),
        pytest.param("raise ZeroDivisionError", 1, "ZeroDivisionError\n", marks=pytest.mark.full),
    ],
)
def test_a_thread_inside_torch_does_not_abort_a_rank_that_ends(
    ending: str, code: int, says: str, tmp_path: Path
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT.format(ending=ending), encoding="utf-8")

    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run([sys.executable, str(script)], check=False, env=environment, capture_output=True, text=True)

    assert done.returncode == code, done.stderr
    assert done.stdout == "of the body, registered for the exit\n"
    assert done.stderr.endswith(says)
