"""Training after a growth in plain torch and float64, with a learning rate and a weight decay of each row's own.

Written from the meaning of the rules; what it shares with the engine is the checkpoint that both begin with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from tests.helpers.plain_torch import PlainRun, Weights, sample_order, tokenformer

SIZES = {"query": "qkv", "key": "qkv", "value": "qkv", "proj": "proj", "mlp": "ffn"}
"""Sublayer -> key of its count of parameter tokens, without `_slot_num`."""


@dataclass
class GrownRun:
    """A run that grew after `grow.at_step` steps, from its larger checkpoint of that step on."""

    settings: dict[str, Any]
    """Keys of its YAML."""
    batch: int
    """Samples per step."""
    weights: Weights = field(default_factory=dict)
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)
    count: int = 0

    def load(self, checkpoint: Path) -> None:
        for layer in read_states(read_checkpoint(checkpoint)):
            for name, state in layer.by_global_name():
                assert state.master is not None and state.step is not None
                self.weights[name] = state.master.double().requires_grad_()
                self.first[name] = state.moments["exp_avg"].double()
                self.second[name] = state.moments["exp_avg_sq"].double()
                self.count = int(state.step)

    def follow(self, prefix: Path, steps: int) -> Iterator[tuple[float, float]]:
        """Yield (loss, norm of what trains before clipping) of each of the `steps` after growth."""
        grow = self.settings["grow"]
        begin, total = grow["at_step"], self.settings["train_iters"]
        samples = sample_order(prefix, self.settings, total * self.batch)
        for _ in range(begin * self.batch):
            next(samples)
        scales = {name: self.settings[f"{size}_slot_num"] for name, size in SIZES.items()}
        schedule = PlainRun(self.settings, self.batch, total)
        is_new = {name: self.new_rows(name) for name in self.weights}
        for step in range(steps):
            tokens = torch.stack([next(samples) for _ in range(self.batch)])
            opened = self.opened(is_new, step)
            logits = tokenformer(opened, tokens[:, :-1], self.settings | {"scales": scales})
            loss = F.cross_entropy(logits.flatten(0, -2), tokens[:, 1:].flatten())
            found = torch.autograd.grad(loss, list(self.weights.values()))
            frozen = step < grow.get("old_rows_iters", 0) and grow["old_rows_lr"] == 0
            gradients = {
                name: torch.where(is_new[name], g, 0.0) if frozen else g
                for name, g in zip(self.weights, found, strict=True)
            }
            norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
            clip = min(1.0, self.settings["gradient_clipping"] / (norm + 1e-6))
            with torch.no_grad():
                self.count += 1
                for name in self.weights:
                    rates = schedule.learning_rate(begin + step) * self.factors(is_new[name], step)
                    self.step(name, gradients[name] * clip, rates, is_new[name], frozen=frozen)
            yield float(loss.detach()), norm

    def new_rows(self, name: str) -> Tensor:
        """Which elements of a parameter are new."""
        weight = self.weights[name]
        new = torch.zeros_like(weight, dtype=torch.bool)
        if name.endswith("_tokens"):
            new[self.settings[f"{SIZES[name.split('.')[-2]]}_slot_num"] :] = True
        return new

    def opened(self, is_new: dict[str, Tensor], step: int) -> Weights:
        ramp = self.settings["grow"].get("ramp_iters")
        multiplier = 1.0 if ramp is None else min(step / ramp, 1.0)
        return {
            name: torch.where(is_new[name], weight * multiplier, weight) if name.endswith("key_tokens") else weight
            for name, weight in self.weights.items()
        }

    def factors(self, is_new: Tensor, step: int) -> Tensor:
        grow = self.settings["grow"]
        kind = grow.get("learning_rate", "continue")
        warm = 1.0 if kind == "continue" else min(step / grow["rewarm_iters"], 1.0)
        old = grow["old_rows_lr"] if step < grow.get("old_rows_iters", 0) else 1.0
        old *= warm if kind == "rewarm_all" else 1.0
        return torch.where(is_new, torch.tensor(warm, dtype=torch.float64), torch.tensor(old, dtype=torch.float64))

    def step(self, name: str, gradient: Tensor, rates: Tensor, is_new: Tensor, *, frozen: bool) -> None:
        weight = self.weights[name]
        trains = is_new if frozen else torch.ones_like(is_new)
        first = 0.9 * self.first[name] + 0.1 * gradient
        second = 0.95 * self.second[name] + 0.05 * gradient**2
        m, v = first / (1 - 0.9**self.count), second / (1 - 0.95**self.count)
        decay = torch.full_like(weight, self.settings["weight_decay"])
        own = self.settings["grow"].get("new_rows_weight_decay")
        if own is not None:
            decay[is_new] = own
        if "norm" in name:
            decay.zero_()
        moved = weight * (1 - rates * decay) - rates * m / (v.sqrt() + 1e-8)
        weight.copy_(torch.where(trains, moved, weight))
        self.first[name] = torch.where(trains, first, self.first[name])
        self.second[name] = torch.where(trains, second, self.second[name])
