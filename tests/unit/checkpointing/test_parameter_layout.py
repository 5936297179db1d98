"""The layout of checkpoint files against modules built for several tensor-parallel sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.checkpointing.states.parameter_layout import fit_vocabulary, layer_layouts, merge, shard_shape, split
from megatron.config.sections.model import ModelConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import build_local, layer_entries, layer_names, pipeline_location
from megatron.model.embedding import TiedHead
from megatron.model.layer_spec import ARCHITECTURES
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec, zeros
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

MODELS = {
    "tokenformer": tiny_tokenformer(),
    "tokenformer_untied": tiny_tokenformer(tie_embeddings=False, norm="rmsnorm"),
    "gpt_neox": tiny_pythia(),
    "gpt2": tiny_gpt2(),
    "llama": tiny_llama(),
    "gpt_neox_tied": tiny_pythia(tie_embeddings=True),
}


def test_every_architecture_is_covered() -> None:
    assert {model.architecture for model in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_layout_describes_the_built_layers(model: ModelConfig, tensor_size: int) -> None:
    context = ParallelContext(tensor_size=tensor_size)
    built = {
        (index, name): tuple(parameter.shape)
        for index, entry in enumerate(layer_entries(model, VOCAB, context))
        if entry.module is not TiedHead
        for name, parameter in entry.build().named_parameters()
    }
    described = {
        (layout.index, name): shard_shape(spec, tensor_size)
        for layout in layer_layouts(model, VOCAB)
        for name, spec in layout.parameters.items()
    }
    assert described == built


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_global_names_are_those_of_the_whole_model(model: ModelConfig) -> None:
    layouts = layer_layouts(model, VOCAB)
    names = {layout.global_name(name): (layout.index, name) for layout in layouts for name in layout.parameters}
    assert names.keys() == dict(build_local(model, VOCAB, seed=None).named_parameters()).keys()
    assert all(pipeline_location(name, model) == location for name, location in names.items())
    assert [layout.name for layout in layouts] == list(dict.fromkeys(layer_names(model)))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_merged_parts_are_the_initial_weights(model: ModelConfig) -> None:
    """Every layout starts from the same whole weights, so the parts of two ranks merge to them."""
    whole = dict(build_local(model, VOCAB, seed=3).named_parameters())
    parts: list[dict[str, nn.Parameter]] = [
        dict(build_local(model, VOCAB, 3, ParallelContext(tensor_size=2, tensor_rank=rank)).named_parameters())
        for rank in range(2)
    ]
    for layout in layer_layouts(model, VOCAB):
        for local, spec in layout.parameters.items():
            name = layout.global_name(local)
            assert torch.equal(merge([part[name] for part in parts], spec), whole[name]), name


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_split_weights_are_those_of_the_ranks(model: ModelConfig) -> None:
    whole = dict(build_local(model, VOCAB, seed=3).named_parameters())
    parts = [
        dict(build_local(model, VOCAB, 3, ParallelContext(tensor_size=2, tensor_rank=rank)).named_parameters())
        for rank in range(2)
    ]
    for layout in layer_layouts(model, VOCAB):
        for local, spec in layout.parameters.items():
            name = layout.global_name(local)
            for ours, part in zip(split(whole[name].detach(), spec, 2), parts, strict=True):
                assert torch.equal(ours, part[name]), name


def test_vocabulary_rows_are_kept_and_padding_is_zero() -> None:
    spec = ParameterSpec((4, 2), 0, zeros, decays=True)
    whole = torch.arange(1.0, 7.0).view(3, 2)
    assert fit_vocabulary(whole, spec, 3).tolist() == [[1, 2], [3, 4], [5, 6], [0, 0]]
    assert fit_vocabulary(whole, spec, 2).tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    same = torch.ones(4, 2)
    assert fit_vocabulary(same, spec, 2) is same
    for rows, columns, tokens in ((3, 3, 3), (3, 2, 4), (8, 2, 5)):
        with pytest.raises(CheckpointError, match=r"this run's has \(4, 2\)"):
            fit_vocabulary(torch.ones(rows, columns), spec, tokens)


def test_wrong_parts_are_refused() -> None:
    split = ParameterSpec((4, 3), 0, zeros, decays=True)
    replicated = ParameterSpec((3,), None, zeros, decays=False)
    with pytest.raises(CheckpointError, match=r"rank 1 has shape \(1, 3\), not \(2, 3\)"):
        merge([torch.zeros(2, 3), torch.zeros(1, 3)], split)
    with pytest.raises(CheckpointError, match="4 rows or columns do not split evenly over 3"):
        merge([torch.zeros(1, 3)] * 3, split)
    with pytest.raises(CheckpointError, match="ranks 0 and 1 have different values"):
        merge([torch.zeros(3), torch.ones(3)], replicated)
