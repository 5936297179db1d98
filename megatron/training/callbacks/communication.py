"""Logs a table of what a rank sends in a step (`comms_logger`)."""

from __future__ import annotations

import logging
from functools import partial

from torch import distributed

from megatron.errors import UserError
from megatron.mpu.communication_tally import CommunicationTally, communication_table, kind_of_ranks
from megatron.training.callback import Callback
from megatron.training.progress import Step

logger = logging.getLogger(__name__)


class Communication(Callback):
    """Counts the operations of all steps but the first, in which groups meet, and logs the mean step of rank 0."""

    def start(self) -> None:
        """Begins to count."""
        self.trace = self.context.run.watchdog.trace
        self.trace.tally = self.tally = CommunicationTally()
        self.first = self.context.progress.iteration + 1
        self.has_shown = False

    def after_step(self, step: Step) -> None:
        """Drops the first step, and shows the table at the first progress line after it."""
        if step.iteration == self.first:
            self.trace.tally = self.tally = CommunicationTally()
        elif not self.has_shown and step.iteration % self.context.run.config.monitor.log_interval == 0:
            self.has_shown = True
            self._show()

    def finish(self) -> None:
        """Shows the table of all steps."""
        self.trace.tally = None
        self._show()

    def on_error(self, error: UserError) -> None:
        """Stops counting."""
        self.trace.tally = None

    def _show(self) -> None:
        if distributed.get_rank() != 0 or self.tally.steps == 0:
            return
        ranks_of = {name: channel.ranks for name, channel in self.trace.channels.items()}
        table = communication_table(self.tally, ranks_of, partial(kind_of_ranks, context=self.context.run.parallel))
        logger.info("communication per step of rank 0, mean of %d steps:\n%s", self.tally.steps, table)
