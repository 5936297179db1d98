"""Notices that the run's folder was removed, or taken by another process."""

from __future__ import annotations

from megatron.training.callback import Callback
from megatron.training.progress import Step


class RunFolder(Callback):
    """Looks at the run's folders when a heartbeat was in doubt, after the step in which all ranks learn of it.

    A folder that was removed is made again, and run.json in it: the model is worth more than the folder, and the next
    save has a place. Where another process has taken the lease, or the file system is gone, the run ends with a
    CheckpointError on all ranks, and writes no more.
    """

    def after_step(self, step: Step) -> None:
        """Looks where any rank is in doubt. Collective."""
        run = self.context.run
        if run.guard.stop.lease_must_be_checked:
            run.lease.check()
