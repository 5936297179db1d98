"""The grid of ranks, and errors that name what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megatron.config.sections.model import ParamTokenConfig
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed
from tests.helpers.models import VOCAB, tiny_pythia, tiny_tokenformer


def place(tensor: int, pipe: int) -> tuple[ParallelContext, dict[str, list[int]]]:
    context = ParallelContext.create(tensor, pipe, sequence_parallel=True)
    groups = {axis: getattr(context, f"{axis}_group") for axis in ("tensor", "data")}
    ranks = {axis: [] if group is None else dist.get_process_group_ranks(group) for axis, group in groups.items()}
    return replace(context, tensor_group=None, data_group=None), ranks


@pytest.mark.parametrize(("tensor", "pipe"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_stand_where_deepspeed_puts_them(tensor: int, pipe: int) -> None:
    data = 4 // (tensor * pipe)
    topology = PipeModelDataParallelTopology(num_pp=pipe, num_mp=tensor, num_dp=data)
    for rank, (context, groups) in enumerate(run_distributed(place, 4, tensor, pipe)):
        assert (context.tensor_size, context.pipe_size, context.data_size) == (tensor, pipe, data)
        coordinates = topology.get_coord(rank)
        assert (context.pipe_rank, context.data_rank, context.tensor_rank) == (
            coordinates.pipe,
            coordinates.data,
            coordinates.model,
        )
        for axis, size, theirs in (("tensor", tensor, "model"), ("data", data, "data")):
            together = [] if size == 1 else next(g for g in topology.get_axis_comm_lists(theirs) if rank in g)
            assert groups[axis] == together
        assert context.sequence_parallel == (tensor > 1)


def create_too_large() -> str:
    with pytest.raises(ConfigError) as error:
        ParallelContext.create(3, 2)
    return str(error.value)


def test_a_grid_that_does_not_fit_is_refused() -> None:
    for message in run_distributed(create_too_large, 4):
        assert "does not divide the 4 ranks" in message


TP4 = ParallelContext(tensor_size=4)
TP4_SEQUENCE = ParallelContext(tensor_size=4, sequence_parallel=True)


@pytest.mark.parametrize(
    ("model", "vocab", "context", "message"),
    [
        (tiny_tokenformer(tokens=ParamTokenConfig(qkv=26, proj=16, ffn=40)), VOCAB, TP4, "26.*Nearest valid: 24 or 28"),
        (tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=3, ffn=40)), VOCAB, TP4, "3.*Nearest valid: 4"),
        (tiny_pythia(hidden_size=36, num_attention_heads=6), VOCAB, TP4, "heads: 6.*Nearest valid: 4 or 8"),
        (tiny_pythia(), VocabSize(61, 62), TP4, "padded vocabulary: 62.*Nearest valid: 60 or 64"),
        (tiny_pythia(seq_length=14), VOCAB, TP4_SEQUENCE, "seq_length.*14.*Nearest valid: 12 or 16"),
        (tiny_pythia(rotary_pct=0.4), VOCAB, ParallelContext(), "rotary_pct=0.4 of a head of 8 features is 3"),
        (tiny_pythia(rotary_pct=0.1), VOCAB, ParallelContext(), "rotary_pct=0.1 of a head of 8 features is 0"),
        (tiny_pythia(num_attention_heads=5), VOCAB, ParallelContext(), "32.*num_attention_heads=5"),
    ],
)
def test_numbers_that_do_not_divide_name_the_nearest_that_do(model, vocab, context, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_local(model, vocab, None, context)
