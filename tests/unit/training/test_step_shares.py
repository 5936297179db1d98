"""Shares that steps read: how often, the same everywhere, and what they cost; the scale under which they are read."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megatron.config.model_size import training_flops
from megatron.config.sections.elastic import ElasticConfig
from megatron.config.sections.model import ParamTokenConfig
from megatron.config.token_share import model_of_share, nearest_share, tokens_of_share
from megatron.kernels.pattention.backends.reference import pattention_reference
from megatron.model.causal_lm import build_local
from megatron.model.token_shares import TokenShares, sublayer_names
from megatron.mpu.context import ParallelContext
from megatron.training.elastic.step_shares import WHOLE, mean_saved_flops, saved_flops, step_shares
from tests.helpers.models import VOCAB, tiny_tokenformer

SHARES = [1.0, 0.5, 0.25]
MODEL = tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=16, ffn=48, groups=2))


def test_every_share_is_drawn_equally_often() -> None:
    drawn = Counter(
        share
        for step in range(3000)
        for (shares,) in [step_shares(ElasticConfig(shares=SHARES), MODEL, 7, step)]
        for share in set(shares.values())
    )
    assert set(drawn) == set(SHARES)
    assert all(abs(count - 1000) < 4 * math.sqrt(3000 * 2 / 9) for count in drawn.values()), drawn


def test_seed_and_step_decide() -> None:
    config = ElasticConfig(shares=SHARES, sample="sublayer")
    steps = [step_shares(config, MODEL, 7, step) for step in range(50)]
    assert steps == [step_shares(config, MODEL, 7, step) for step in range(50)]
    assert steps != [step_shares(config, MODEL, 8, step) for step in range(50)]
    assert all(list(shares) == sublayer_names(MODEL) for (shares,) in steps)
    assert any(len(set(shares.values())) > 1 for (shares,) in steps)


def test_the_whole_model_has_its_turn() -> None:
    alternate = ElasticConfig(shares=SHARES, full_model="alternate")
    for step in range(0, 20, 2):
        assert step_shares(alternate, MODEL, 7, step) == [WHOLE]
        assert set(step_shares(alternate, MODEL, 7, step + 1)[0].values()) <= {0.25, 0.5}
    for step in range(20):
        first, second = step_shares(ElasticConfig(shares=SHARES, full_model="always"), MODEL, 7, step)
        assert first == WHOLE and set(second.values()) <= {0.25, 0.5}


def test_what_a_share_saves_is_the_difference_of_the_models() -> None:
    whole = training_flops(MODEL, 64, 16)
    for share in SHARES:
        own = training_flops(model_of_share(MODEL, share), 64, 16)
        assert whole - saved_flops(MODEL, dict.fromkeys(sublayer_names(MODEL), share)) == own
    costs = [training_flops(model_of_share(MODEL, share), 64, 16) for share in SHARES]
    assert whole - mean_saved_flops(ElasticConfig(shares=SHARES), MODEL) == pytest.approx(sum(costs) / 3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_read_equal_parts_of_a_share(ranks: int) -> None:
    """Both ranks together read the rows of one alone, and every sublayer its own share."""

    def read(context: ParallelContext, share: float) -> list[torch.Tensor]:
        module = build_local(MODEL, VOCAB, 5, context)
        layers = list(module.modules())
        tokens = TokenShares(layers, module.named_parameters(), 2, context)
        tokens.read(dict.fromkeys(sublayer_names(MODEL), share))
        return [layer.scoring_keys() for layer in layers if hasattr(layer, "scoring_keys")]

    for share in (0.5, 0.25, 1.0):
        parts = [read(ParallelContext(tensor_size=ranks, tensor_rank=rank), share) for rank in range(ranks)]
        for together, alone in zip(zip(*parts, strict=True), read(ParallelContext.single(), share), strict=True):
            assert torch.equal(torch.cat(list(together)), alone)


@pytest.mark.parametrize("theta", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_under_the_scale_of_the_whole_a_share_adds_as_much(theta: str) -> None:
    """The root mean square of a Pattention's output with random tokens, against that of all tokens.

    Softmax averages values, so that fewer of them add more. Under a scale that followed the count, a quarter of the
    tokens would add half as much.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 64, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(512, 64, generator=generator, dtype=torch.float64) for _ in range(2))

    def size(count: int, scale: int) -> float:
        scaled = 0.02 * keys[:count]
        return float(pattention_reference(x, scaled, values[:count], theta, scale).square().mean().sqrt())

    whole = size(512, 512)
    pinned, following = size(128, 512) / whole, size(128, 128) / whole
    expected = {"l2_norm_gelu": (1.0, 1.35), "gelu_l2_norm": (0.9, 1.1), "softmax": (1.8, 2.2)}[theta]
    assert expected[0] <= pinned <= expected[1]
    assert following == pytest.approx(0.5, abs=0.06)


def test_counts_of_shares() -> None:
    assert tokens_of_share(48, 4, 1 / 3) == tokens_of_share(48, 4, 0.3333333) == 16
    assert tokens_of_share(40, 4, 0.25) is None and tokens_of_share(40, 3, 1.0) is None
    assert tokens_of_share(24, 4, 0.01) is None, "one token of each group at least"
    assert nearest_share(40, 4, 0.25) == "0.2 (8 tokens)"
