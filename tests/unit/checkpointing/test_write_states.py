"""Weights alone, written and read again without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_states
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import build_local
from tests.helpers.checkpoints import CONFIG
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

MODELS = {"tokenformer": tiny_tokenformer(), "gpt_neox": tiny_pythia(), "gpt2": tiny_gpt2(), "llama": tiny_llama()}


def run_of(model: str) -> RunConfig:
    return CONFIG.model_copy(update={"model": MODELS[model].model_copy(update={"padded_vocab_size": VOCAB.padded})})


def initial_layers(config: RunConfig, dtype: torch.dtype) -> Iterator[LayerState]:
    weights = dict(build_local(config.model, VOCAB, seed=5).named_parameters())
    for layout in layer_layouts(config.model, VOCAB):
        names = {local: weights[layout.global_name(local)].detach().to(dtype) for local in layout.parameters}
        yield LayerState(layout.name, {local: ParameterState(weight) for local, weight in names.items()})


@pytest.mark.parametrize(("model", "tensor"), list(product(MODELS, [1, 2, 4])))
def test_weights_come_back_in_their_format(model: str, tensor: int, tmp_path: Path) -> None:
    config = run_of(model)
    header = RunHeader.new(VOCAB.actual, {"torch": torch.__version__})
    states = initial_layers(config, torch.float16)
    checkpoint = read_checkpoint(write_states(states, config, ParallelSizes(tensor=tensor), tmp_path, header))
    assert checkpoint.holds_weights_alone
    assert checkpoint.vocab == VOCAB
    assert checkpoint.state.tensor_parallel_size == tensor
    for ours, found in zip(initial_layers(config, torch.float16), read_states(checkpoint), strict=True):
        assert ours.name == found.name
        for (name, before), (_, after) in zip(ours.by_global_name(), found.by_global_name(), strict=True):
            assert after.master is None and not after.moments and after.step is None
            assert after.weight.dtype == torch.float16
            assert torch.equal(before.weight, after.weight), name


def test_layers_of_another_model_are_refused(tmp_path: Path) -> None:
    config = run_of("gpt_neox")
    header = RunHeader.new(VOCAB.actual, {})

    def changed(kind: str) -> Iterator[LayerState]:
        for layer in initial_layers(config, torch.float32):
            parameters = dict(layer.parameters)
            if layer.name == "layers.1":
                norm = parameters.pop("input_layernorm.weight")
                if kind == "shape":
                    parameters["input_layernorm.weight"] = norm.map(lambda weight: weight[:3])
                if kind == "name":
                    parameters["input_layernorm.scale"] = norm
            yield replace(layer, parameters=parameters)

    for kind, message in {
        "shape": r"layers.1.input_layernorm.weight has shape \(3,\); the configuration describes",
        "name": "missing input_layernorm.weight; left over input_layernorm.scale",
        "missing": "missing input_layernorm.weight; left over none",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            write_states(changed(kind), config, ParallelSizes(), tmp_path, header)
        assert not list(tmp_path.iterdir())
