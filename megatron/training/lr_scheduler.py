"""Sets the learning rate in step with DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import torch

from megatron.config.learning_rate import LRScheduleConfig, lr_at


class LRScheduler:
    """Sets the learning rate of every parameter group; DeepSpeed calls `step` after each step that was not skipped."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, peak: float, schedule: LRScheduleConfig, train_iters: int
    ) -> None:
        self.optimizer = optimizer
        self.peak = peak
        self.schedule = schedule
        self.train_iters = train_iters
        self.num_steps = 0
        self.learning_rate = 0.0
        """Learning rate of the next optimizer step, of groups without a ratio to it."""
        self._factor = 1.0
        self._apply()

    def scale(self, factor: float) -> None:
        """Multiplies the learning rate by `factor` from now on, in place of an earlier factor."""
        self._factor = factor
        self._apply()

    def step(self) -> None:
        """Advances by one optimizer step."""
        self.num_steps += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Returns the learning rate that the next optimizer step uses, once per parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Returns the steps taken. The shape of the schedule is configuration, not state."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the saved step with the schedule that this run configures."""
        self.num_steps = state["num_steps"]
        self._apply()

    def _apply(self) -> None:
        lr = lr_at(self.num_steps, peak=self.peak, schedule=self.schedule, train_iters=self.train_iters)
        self.learning_rate = lr * self._factor
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group.get("lr_ratio", 1.0)
