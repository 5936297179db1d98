"""What the planner says of a layer against what torch keeps of it for the backward pass, byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron.config.architecture import ARCHITECTURES
from megatron.config.load_config import load_config
from megatron.config.sections.run_config import RunConfig
from megatron.model.layer import TransformerLayer
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import DTYPES, initialize_parameters
from megatron.planner.implementation import implementation_of
from megatron.planner.layer_costs import LAYER_COSTS, layer_costs, shape_of_rank, weights_of
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER

WIDER = {"hidden_size": 64, "seq_length": 48, "max_position_embeddings": 48}
CASES: dict[str, dict[str, Any]] = {
    "tokenformer": TOKENFORMER,
    "tokenformer, scores computed again": TOKENFORMER | {"recompute_scores": True},
    "tokenformer, softmax": TOKENFORMER | {"norm_activation_type": "softmax"},
    "tokenformer, no rotation": TOKENFORMER | {"pos_emb": "none"},
    "pythia": PYTHIA,
    "pythia in sequence, dropout": PYTHIA | {"gpt_j_residual": False, "hidden_dropout": 0.1},
    "pythia, attention dropout": PYTHIA | {"attention_dropout": 0.1},
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama, a head of keys for each query": LLAMA | {"num_kv_heads": 4},
}


def config_of(settings: dict[str, Any], folder: Path) -> RunConfig:
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump(settings | WIDER))
    return load_config([path]).run


def kept_by_torch(run: RunConfig, dtype: torch.dtype) -> float:
    """Bytes for each token that a layer's graph holds, its weights and the rotary tables of all layers apart."""
    context = ParallelContext.single()
    layer = TransformerLayer(run.model, context, 0)
    initialize_parameters(layer.named_parameters(), 1, context)
    layer = layer.to(dtype)
    for module in layer.modules():
        if isinstance(module, Pattention):
            module.recompute_scores = run.training.checkpoint_activations.scores
    x_BSD = torch.randn(2, run.model.seq_length, run.model.hidden_size, dtype=dtype).requires_grad_() * 1.0
    layer(x_BSD)  # makes the tables
    tables = layer.attention.rotary._tables or ()
    others = {one.untyped_storage().data_ptr() for one in (*layer.parameters(), *tables)}
    held: dict[int, tuple[int, Tensor]] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        held[storage.data_ptr()] = (storage.nbytes(), saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x_BSD)
    return sum(size for place, (size, _) in held.items() if place not in others) / (2 * run.model.seq_length)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_the_planner_says(case: str, dtype: str, tmp_path: Path) -> None:
    run = config_of(CASES[case], tmp_path)
    again = run.training.checkpoint_activations.scores
    shape = shape_of_rank(run.model, dtype, 1, False, implementation_of(run, on_gpu=False), again)
    planned = layer_costs(run.model, shape).kept_bytes(shape)
    assert planned == kept_by_torch(run, DTYPES[dtype])


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_which_parameters_and_flops_are_counted(case: str, tmp_path: Path) -> None:
    run = config_of(CASES[case], tmp_path)
    shape = shape_of_rank(run.model, "bf16", 1, False, implementation_of(run, on_gpu=True), False)
    products = layer_costs(run.model, shape).products
    assert weights_of(products) == ARCHITECTURES[run.model.architecture].layer_matrices(run.model)


@pytest.mark.parametrize("case", ["tokenformer", "pythia", "llama"])
def test_ranks_share_what_is_split(case: str, tmp_path: Path) -> None:
    run = config_of(CASES[case], tmp_path)
    implementation = implementation_of(run, on_gpu=True)

    def kept(tensor: int, sequence_parallel: bool) -> float:
        shape = shape_of_rank(run.model, "bf16", tensor, sequence_parallel, implementation, False)
        return layer_costs(run.model, shape).kept_bytes(shape)

    # The whole is more than its parts: the residual stream, and norms' outputs, are on every rank.
    assert kept(1, False) / 2 < kept(2, True) < kept(2, False) < kept(1, False) * (1.15 if case == "tokenformer" else 1)


def test_every_architecture_of_the_planner_is_configured() -> None:
    assert set(LAYER_COSTS) == set(ARCHITECTURES)
