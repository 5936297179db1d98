"""Runs with W&B in processes of their own, as it keeps global state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLANTED_KEY = "0123456789abcdef" * 2 + "planted0"

WANDB_RUN = """
import faulthandler, json, logging, os, sys
from pathlib import Path
from megatron.config.sections.monitor import MonitorConfig, WandbConfig
from megatron.config.redaction import REDACTED
from megatron.monitor.metrics_writer import RunEvent
from megatron.monitor.monitor import build_monitor

faulthandler.dump_traceback_later(60, exit=True)
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
folder, resume_iteration, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
wandb_config = WandbConfig(enabled=True, project="tiny", group="tests", team="us", host="http://127.0.0.1:9")
with build_monitor(
    MonitorConfig(wandb=wandb_config), folder, rank=0, run_name="tiny-run", total_iterations=last,
    resume_iteration=resume_iteration,
    config_dump={"model": {"hidden_size": 64}, "hub_token": os.environ["WANDB_API_KEY"]},
) as monitor:
    for step in range(resume_iteration + 1, last + 1):
        if step == int(os.environ.get("KILL_SERVICE_AT", "-1")):
            import psutil
            # Its own child is waited for, and that child's own are not: without an init nobody would reap them.
            (service,) = psutil.Process().children()
            service.kill()
            service.wait()
        monitor.write(step, {"consumed_tokens": step * 100, "train/lm_loss": 8.0 / step})
        if step == int(os.environ.get("MARK_AT", "-1")):
            monitor.mark(RunEvent(step, "growth", "grown by zero_key", {}))
print("finished")
"""


def run_with_wandb(folder: Path, resume_iteration: int, last: int, **environment: str) -> subprocess.CompletedProcess:
    """Runs WANDB_RUN from `resume_iteration` to `last`, with a planted key that must not come to light."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(folder), str(resume_iteration), str(last)],
        env=inherited
        | {"HOME": str(home), "NETRC": str(home / ".netrc"), "WANDB_API_KEY": PLANTED_KEY, "WANDB_ERROR_REPORTING": "0"}
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
