"""The seam: a stream of whole layers is read from one run, changed, and written for another model and layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.read_states import StateReader, read_states
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.load_config import load_config
from megatron.errors import CheckpointError
from tests.helpers.configs import TOKENFORMER, layout_keys, write_dataset
from tests.helpers.runs import run_ranks

STEPS = 4
KEYS = TOKENFORMER | {"train_iters": 2 * STEPS, "no_weight_tying": False}
GROWN = KEYS | {"ffn_slot_num": KEYS["ffn_slot_num"] + 16, "ffn_scale_base": KEYS["ffn_slot_num"]}


def append_zero_rows(layers: Iterator[LayerState], count: int) -> Iterator[LayerState]:
    """An operator as a user would write it: `count` more feed-forward tokens, moments and all."""

    def longer(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(count, tensor.shape[1])])

    for layer in layers:
        names = [name for name in ("mlp.key_tokens", "mlp.value_tokens") if name in layer.parameters]
        yield layer.replace({name: layer[name].map(longer) for name in names})


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = {"data_path": str(write_dataset(folder / "text")), "index_cache_dir": str(folder / "index")}
        self.source = self.train("source", KEYS, (2, 1, 2), f"exit_interval={STEPS}")

    def config(self, name: str, keys: dict[str, Any], layout: tuple[int, int, int]) -> Path:
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(keys | layout_keys(*layout) | self.data | {"save": str(self.folder / name)}))
        return path

    def train(self, name: str, keys: dict[str, Any], layout: tuple[int, int, int], *overrides: str) -> Checkpoint:
        tensor, pipe, data = layout
        finished = run_ranks(self.config(name, keys, layout), *overrides, ranks=tensor * pipe * data)
        assert finished.code in (0, 75), finished.output
        newest = (self.folder / name / "latest").read_text().strip()
        return read_checkpoint(self.folder / name / newest)

    def loss(self, name: str, iteration: int) -> float:
        rows = map(yaml.safe_load, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return next(float(row["train/lm_loss"]) for row in rows if row["iteration"] == iteration)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_an_operator_changes_weights_masters_and_moments(runs: Runs) -> None:
    """Rows with zero keys change nothing under a pinned scale, so training goes on as if they were not there, in
    another layout, with the moments that the run had."""
    config = load_config([runs.config("grown", GROWN, (1, 2, 1))]).run
    reader = StateReader(runs.source)
    states = append_zero_rows(read_states(runs.source), 16)
    path = write_states(states, config, ParallelSizes(pipe=2), runs.folder / "grown", RunHeader.of(reader))
    for before, after in zip(read_states(runs.source), read_states(read_checkpoint(path)), strict=True):
        for (name, ours), (_, grown) in zip(before.by_global_name(), after.by_global_name(), strict=True):
            rows = len(ours.weight)
            assert grown.step == ours.step == STEPS
            assert grown.moments.keys() == ours.moments.keys() == {"exp_avg", "exp_avg_sq"}
            assert ours.master is not None and grown.master is not None
            for old, new in zip((ours.weight, ours.master, *ours.moments.values()),
                                (grown.weight, grown.master, *grown.moments.values()), strict=True):  # fmt: skip
                assert torch.equal(old, new[:rows]), name
                assert not new[rows:].any() and len(new) - rows == 16 * ("mlp" in name), name
    runs.train("grown", GROWN, (1, 2, 1), "auto_resume=true")
    runs.train("ungrown", KEYS, (1, 2, 1), f"load={runs.source.path.parent}")
    # From the second step on, value gradients differ by the new tokens' share in the norm alone: they are all zero.
    for step in (STEPS + 1, STEPS + 2, 2 * STEPS):
        assert runs.loss("grown", step) == pytest.approx(runs.loss("ungrown", step), abs=1e-6)


@pytest.mark.full
def test_one_layer_is_in_memory_at_a_time(runs: Runs, tmp_path: Path) -> None:
    """The writer lets go of a layer before it asks for the next one."""
    import gc
    import weakref

    alive: list[weakref.ref[LayerState]] = []

    def watched() -> Iterator[LayerState]:
        for layer in read_states(runs.source):
            gc.collect()
            assert not any(reference() for reference in alive)
            alive.append(weakref.ref(layer))
            yield layer
            del layer

    header = RunHeader.of(StateReader(runs.source))
    write_states(watched(), runs.source.config, ParallelSizes(tensor=2, pipe=2), tmp_path, header)


def test_a_failure_on_the_way_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    layers = list(read_states(runs.source))
    header = RunHeader.of(StateReader(runs.source))

    def failing(kind: str) -> Iterator[LayerState]:
        yield from layers[: len(layers) if kind == "left over" else -1]
        if kind == "left over":
            yield replace(layers[-1], name="layers.7")
        if kind == "stepped":
            last = layers[-1]
            yield last.replace({name: replace(state, step=1.0) for name, state in list(last.parameters.items())[:1]})
        if kind == "error":
            raise ValueError("the operator's own")

    for kind, message in {
        "missing": "layers of the configured model are missing: final_norm",
        "left over": "layers.7 is no layer of the configured model",
        "stepped": "parameters of one group .* were stepped",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            write_states(failing(kind), runs.source.config, ParallelSizes(), tmp_path, header)
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="the operator's own"):
        write_states(failing("error"), runs.source.config, ParallelSizes(), tmp_path, header)
    assert not list(tmp_path.iterdir())
