"""Writes to Weights & Biases, which is imported only when asked for and which a run survives losing."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

from megatron.config.redaction import redact
from megatron.config.sections.monitor import MonitorConfig, WandbConfig
from megatron.errors import EnvironmentSetupError
from megatron.io.durable import replace_durably
from megatron.monitor.metrics_writer import WRITERS, MonitoredRun, RunEvent, lost_on
from megatron.registry import install_extra, require

_logger = logging.getLogger(__name__)

_RUN_ID_FILE = "wandb_run_id.txt"


class WandbWriter:
    """Writes one W&B run per run folder: a resumed run continues it, over `iteration` as its horizontal axis.

    WANDB_MODE=offline keeps everything in the run's folder for a later `wandb sync`. W&B reads the API key itself
    (WANDB_API_KEY, netrc): it never passes through here.
    """

    def __init__(
        self,
        wandb_config: WandbConfig,
        run_dir: Path,
        *,
        run_name: str | None,
        resume_iteration: int,
        config_dump: Mapping[str, object],
    ) -> None:
        """Opens the W&B run; secrets in `config_dump` are redacted.

        Raises EnvironmentSetupError where the package or the credentials are missing, BackendLostError where the server
        cannot be reached.
        """
        wandb = require("wandb", "use_wandb", install_extra("monitor"))
        mailbox = require("wandb.sdk.mailbox", "use_wandb", install_extra("monitor"))
        # wandb talks to a process of its own: its errors, and those of a lost connection to that process.
        self._errors = (wandb.Error, mailbox.MailboxClosedError, mailbox.HandleAbandonedError, OSError)
        # Silent also means that wandb fails for want of a key instead of asking, while other ranks wait.
        wandb.setup(settings=wandb.Settings(silent=True))
        with self._guarded():
            run_dir.mkdir(parents=True, exist_ok=True)
            try:
                self._run = wandb.init(
                    project=wandb_config.project,
                    group=wandb_config.group,
                    entity=wandb_config.team,
                    name=run_name,
                    id=_run_id(run_dir, resume_iteration),
                    resume="allow",
                    dir=str(run_dir),
                    config=redact(config_dump),
                    settings=_settings(wandb, wandb_config.host),
                )
            except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
                raise EnvironmentSetupError(
                    f"use_wandb: W&B refuses to start: {error} "
                    "Log in with `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to keep the run local."
                ) from error
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        _logger.info("W&B: %s", self._run.url or self._run.dir)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        with self._guarded():
            self._run.log({"iteration": iteration, **metrics})

    def mark(self, event: RunEvent) -> None:
        with self._guarded():
            self._run.summary[f"{event.kind}/step_{event.iteration}"] = event.text

    def close(self) -> None:
        with self._guarded():
            self._run.finish()

    def _guarded(self) -> AbstractContextManager[None]:
        return lost_on("Weights & Biases", self._errors)


@WRITERS.register("wandb")
def build_wandb(config: MonitorConfig, run: MonitoredRun) -> WandbWriter | None:
    """Builds the writer of `use_wandb`."""
    if not config.wandb.enabled:
        return None
    return WandbWriter(
        config.wandb,
        run.folder,
        run_name=config.wandb.run_name or run.name,
        resume_iteration=run.resume_iteration,
        config_dump=run.config_dump,
    )


def _settings(wandb: ModuleType, host: str | None) -> object:
    """Returns settings that keep code, console output and git remotes on the machine: they may hold anything."""
    server = {"base_url": host} if host else {}
    return wandb.Settings(silent=True, console="off", save_code=False, disable_git=True, **server)


def _run_id(run_dir: Path, resume_iteration: int) -> str:
    """Returns the W&B identity of the run in `run_dir`: the recorded one on resume, else a new one, and records it."""
    path = run_dir / _RUN_ID_FILE
    if resume_iteration and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    replace_durably(path, f"{run_id}\n")
    return run_id
