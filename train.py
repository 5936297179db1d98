"""Trains one rank: `python deepy.py train.py config.yml` starts it, as do torchrun, srun and mpirun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron.errors import end_at_once_when_stopped, exit_on_user_error


def main(argv: Sequence[str]) -> int:
    """Loads the configuration and trains. Returns the exit code."""
    end_at_once_when_stopped()
    from megatron.config.command_line import load_command_line
    from megatron.config.load_config import print_warnings
    from megatron.training.check_config import require_trainable

    command, loaded = load_command_line(argv, "train.py", require_trainable)
    if command.plan:
        from megatron.training.plan_run import plan_report

        print(plan_report(loaded, command))
    if command.answered:
        return 0
    from megatron.launch.environment import prepare_environment

    prepare_environment()
    print_warnings(loaded)
    if command.calibrate:
        from megatron.training.calibrate import calibrate

        report = calibrate(loaded.run)
        if os.environ["RANK"] == "0":
            print(report)
        return 0
    batch = loaded.batch(int(os.environ["WORLD_SIZE"]))
    if command.preflight:
        from megatron.training.preflight import preflight

        return preflight(loaded.run, batch, loaded.run_folder)
    from megatron.training.pretrain import pretrain

    return pretrain(loaded.run, batch, loaded.run_folder, loaded.given)


if __name__ == "__main__":
    exit_on_user_error(lambda: main(sys.argv[1:]))
