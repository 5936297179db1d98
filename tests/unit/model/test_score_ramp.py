"""Scores of new tokens that open: the same as keys multiplied by hand, outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.config.sections.model import ParamTokenConfig
from megatron.model.causal_lm import build_local
from megatron.model.new_rows import local_old_rows
from megatron.model.score_ramp import ScoreRamp
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec
from tests.helpers.models import VOCAB, tiny_tokenformer

OLD = {"query": 16, "key": 16, "value": 16, "proj": 16, "mlp": 24}
RECORD = GrowthRecord(
    iteration=100,
    tokens=0,
    before=ModelSizes(qkv=16, proj=16, ffn=24, num_layers=2),
    after=ModelSizes(qkv=24, proj=16, ffn=40, num_layers=2),
    rules=GrowthRules(operator="mask_ramp", ramp_iters=8),
)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize(("iteration", "multiplier"), [(100, 0.0), (103, 0.375), (108, 1.0), (500, 1.0)])
def test_it_equals_keys_that_are_multiplied(theta: str, iteration: int, multiplier: float) -> None:
    model = tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=16, ffn=40, theta=theta))
    opening, by_hand = (build_local(model, VOCAB, seed=1).double() for _ in range(2))
    tokens = torch.randint(VOCAB.actual, (2, 16), generator=torch.Generator().manual_seed(3))
    ramp = ScoreRamp(opening.modules(), opening.named_parameters(), RECORD, ParallelContext.single())
    ramp.set_step(iteration)
    factors = {}
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if name.endswith("key_tokens"):
                factors[name] = torch.ones(len(parameter), 1, dtype=torch.float64)
                factors[name][OLD[name.split(".")[-2]] :] = multiplier
                parameter.mul_(factors[name])
    outputs = [module(tokens) for module in (opening, by_hand)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)
    for output in outputs:
        output.square().mean().backward()
    expected = dict(by_hand.named_parameters())
    for name, parameter in opening.named_parameters():
        gradient = expected[name].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, gradient * factors.get(name, 1.0), rtol=0, atol=1e-13)


def test_a_ramp_that_is_over_costs_nothing() -> None:
    """The keys themselves are used, and not a copy."""
    module = build_local(tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=16, ffn=40)), VOCAB, seed=1)
    ramp = ScoreRamp(module.modules(), module.named_parameters(), RECORD, ParallelContext.single())
    mlp = module.layers[0].mlp
    assert mlp.scoring_keys() is mlp.key_tokens
    ramp.set_step(104)
    assert mlp.scoring_keys() is not mlp.key_tokens
    attention = module.layers[0].attention
    assert attention.proj.scoring_keys() is attention.proj.key_tokens, "nothing of it is new"
    ramp.set_step(108)
    assert mlp.scoring_keys() is mlp.key_tokens


@pytest.mark.parametrize(("ranks", "old"), [(1, [24]), (2, [20, 4]), (4, [10, 10, 4, 0])])
def test_ranks_share_the_old_rows(ranks: int, old: list[int]) -> None:
    """Tokens are split by their order, so that the last ranks may hold new ones alone."""
    spec = parameter_spec(build_local(tiny_tokenformer(), VOCAB, seed=None).layers[0].mlp.key_tokens)
    for rank, rows in enumerate(old):
        context = ParallelContext(tensor_size=ranks, tensor_rank=rank)
        assert local_old_rows("layers.0.mlp.key_tokens", spec, RECORD, context) == rows
        assert local_old_rows("layers.0.attention.proj.key_tokens", spec, RECORD, context) == 40 // ranks
