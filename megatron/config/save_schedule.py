"""Steps after which a run saves a checkpoint."""

from __future__ import annotations

import itertools

from megatron.config.sections.checkpoint import CheckpointConfig


def save_iterations(config: CheckpointConfig, train_iters: int) -> frozenset[int]:
    """Returns the steps after which a checkpoint is written, spaced as in GPT-NeoX; 0 stands for the initial weights.

    Pythia's 154 checkpoints are `checkpoint_factor: 1000` with `extra_save_iters: [0, 1, 2, 4, ..., 512]` over 143,000
    steps. The last step is always among them.
    """
    iterations = {iteration for iteration in config.extra_save_iters if iteration <= train_iters}
    factor = config.checkpoint_factor
    if factor is not None:
        spaced = range(1, train_iters) if config.checkpoint_scale == "linear" else itertools.count()
        positions = (k * factor if config.checkpoint_scale == "linear" else float(factor) ** k for k in spaced)
        iterations.update(int(position) for position in itertools.takewhile(lambda p: p < train_iters, positions))
    return frozenset(iterations | {train_iters})


def is_kept_for_ever(iteration: int, config: CheckpointConfig) -> bool:
    """Tells whether the checkpoint of a step is never deleted, however old it is."""
    if config.keep_every_n_iters is not None and iteration % config.keep_every_n_iters == 0:
        return True
    return config.keep_extra_save_iters and iteration in config.extra_save_iters
