"""A console that is closed does not end a run."""

import subprocess
import sys


def test_a_closed_pipe_does_not_end_the_run() -> None:
    code = (
        "import sys; from megatron.monitor.monitor import Monitor\n"
        "from megatron.monitor.writers.console import ConsoleWriter\n"
        "monitor = Monitor([ConsoleWriter(10)])\n"
        "sys.stdin.read()\n"
        "for step in range(1, 11): monitor.write(step, {'train/lm_loss': 1.0})\n"
        "print('trained on', file=sys.stderr)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert "trained on" in errors
    assert errors.count("The run goes on without it") == 1
