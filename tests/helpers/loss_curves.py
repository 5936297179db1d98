"""Folders of runs whose losses follow a formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config.load_config import load_config
from megatron.config.model_size import count_parameters, training_flops
from tests.helpers.configs import TOKENFORMER, VOCAB_SIZE

TOKENS_PER_STEP = 128
SMALL = {"qkv_slot_num": 24, "proj_slot_num": 24, "ffn_slot_num": 48}
LARGE = {name: 2 * count for name, count in SMALL.items()}

Loss = Callable[[float], float]
"""Step, counted by the run -> loss [nat/token]."""


class CurveWriter:
    """Writes runs into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def flops_per_step(self, sizes: dict[str, int]) -> int:
        model = self._config(sizes, 1, {}).model
        return TOKENS_PER_STEP * training_flops(model, VOCAB_SIZE, model.seq_length)

    def write(
        self, name: str, sizes: dict[str, int], loss: Loss, steps: range, *, seed: int = 1, lr: float = 1e-3,
        train: Loss | None = None, rate: Loss | None = None, every: int = 10, **keys: Any,
    ) -> str:  # fmt: skip
        """Writes the run `name` with a row for each of `steps`, and a validation in each that `every` divides."""
        config = self._config(sizes, seed, {"optimizer": TOKENFORMER["optimizer"] | {"params": {"lr": lr}}} | keys)
        folder = self.folder / name
        folder.mkdir()
        rows = []
        for step in steps:
            row = {
                "iteration": step,
                "consumed_tokens": step * TOKENS_PER_STEP,
                "train/lm_loss": (train or loss)(step),
                "train/learning_rate": rate(step) if rate else lr,
            }
            rows.append(row | ({"valid/lm_loss": loss(step)} if step % every == 0 else {}))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        model = config.model
        description = {
            "name": name,
            "parameters": count_parameters(model, VOCAB_SIZE),
            "flops_per_token": training_flops(model, VOCAB_SIZE, model.seq_length),
            "tokens_per_step": TOKENS_PER_STEP,
            "config": config.model_dump(mode="json"),
        }
        (folder / "run.json").write_text(json.dumps(description))
        return str(folder)

    def _config(self, sizes: dict[str, int], seed: int, keys: dict[str, Any]) -> Any:
        file = self.folder / "config.json"
        file.write_text(json.dumps(TOKENFORMER | sizes | {"seed": seed} | keys))
        return load_config([file]).run
