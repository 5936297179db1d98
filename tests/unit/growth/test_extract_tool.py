"""tools/ckpts/extract.py and prune.py as users call them: rows, logits, order, importance, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.token_rows import in_groups, with_tokens_of
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.config.token_share import model_of_share
from megatron.errors import ConfigError, DataError
from megatron.growth.shrinking.prune_tokens import by_importance, token_importance, with_recomputed_scale
from megatron.model.causal_lm import build_local
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.models import tiny_tokenformer
from tests.helpers.plain_torch import tokenformer
from tests.helpers.tiny_checkpoints import VOCAB, make_checkpoint, tokens, write_yaml
from tools.ckpts import extract, grow, prune

GROUPS = 4
KEYS: dict[str, Any] = TOKENFORMER | {"qkv_slot_num": 32, "proj_slot_num": 32, "param_token_groups": GROUPS}
SCALES = {"query": 32, "key": 32, "value": 32, "proj": 32, "mlp": 48}
THETAS = ["l2_norm_gelu", *(pytest.param(theta, marks=pytest.mark.full) for theta in ("gelu_l2_norm", "softmax"))]

Call = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Checkpoint:
    """Tests only read it."""
    return make_checkpoint(write_yaml(tmp_path_factory.mktemp("source"), KEYS | {"data_path": str(dataset)}))


@pytest.fixture
def call(tmp_path: Path, source: Checkpoint) -> Call:
    def run(tool: Any, *words: str, given: Checkpoint = source) -> Checkpoint:
        output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert tool.main(["--input_dir", str(given.path), "--output_dir", str(output), *words]) == 0
        return read_checkpoint(output / given.path.name)

    return run


def taken(weights: dict[str, Tensor], share: float, groups: int = GROUPS) -> dict[str, Tensor]:
    """The first rows of each group, written out."""
    found = dict(weights)
    for name, weight in weights.items():
        if name.endswith("_tokens"):
            block = len(weight) // groups
            rows = [group * block + row for group in range(groups) for row in range(round(share * block))]
            found[name] = weight[rows]
    return found


def logits_of(model: ModelConfig, weights: dict[str, Tensor]) -> Tensor:
    """In float64, by the project's own layers."""
    module = build_local(model, VOCAB, seed=None).double().eval()
    module.load_state_dict({name: weight.double() for name, weight in weights.items()})
    with torch.no_grad():
        logits: Tensor = module(tokens())
    return logits


@pytest.mark.parametrize(("share", "layout"), [("0.5", (1, 1)), ("0.25", (2, 1)), ("0.5", (1, 2))])
def test_an_extracted_model_has_rows_of_the_large_one_bitwise(
    share: str, layout: tuple[int, int], call: Call, source: Checkpoint
) -> None:
    ranks = [f"model_parallel_size={layout[0]}", f"pipe_parallel_size={layout[1]}"]
    small = call(extract, "--share", share, "--config_file", str(source.path.parents[1] / "run.yml"), *ranks)
    assert (small.state.tensor_parallel_size, small.state.pipe_parallel_size) == layout
    expected = taken(read_weights(source), float(share))
    found = read_weights(small)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    sizes = small.config.model.param_tokens
    assert sizes is not None and (sizes.qkv, sizes.proj, sizes.ffn) == tuple(
        round(float(share) * n) for n in (32, 32, 48)
    )
    assert (sizes.qkv_scale_base, sizes.proj_scale_base, sizes.ffn_scale_base) == (32, 32, 48)
    reference = tokenformer({name: w.double() for name, w in found.items()}, tokens(), KEYS | {"scales": SCALES})
    ours = logits_of(small.config.model, found)
    # Tables of rotary positions are float32 here.
    assert (ours - reference).abs().max() < 1e-6 * reference.abs().max()


def test_a_share_of_a_share_is_the_share_and_counts_do_the_same(call: Call, source: Checkpoint) -> None:
    twice = call(extract, "--share", "0.5", given=call(extract, "--share", "0.5"))
    counted = call(extract, "--qkv", "8", "--proj", "8", "--ffn", "12")
    expected = taken(read_weights(source), 0.25)
    for found in (read_weights(twice), read_weights(counted)):
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("theta", THETAS)
def test_other_groups_keep_the_function_and_every_share(theta: str, tmp_path: Path, dataset: Path) -> None:
    """Logits agree to 1e-13 in float64, of the whole and of each share that both groupings have."""
    config = write_yaml(tmp_path, KEYS | {"data_path": str(dataset), "norm_activation_type": theta})
    source = make_checkpoint(config)
    output = tmp_path / "one"
    words = ["--input_dir", str(source.path), "--output_dir", str(output), "--share", "1", "--groups", "1"]
    assert extract.main(words) == 0
    one = read_checkpoint(output / source.path.name)
    assert one.config.model.param_tokens is not None and one.config.model.param_tokens.groups == 1
    grouped, plain = read_weights(source), read_weights(one)
    assert not torch.equal(grouped["layers.0.mlp.key_tokens"], plain["layers.0.mlp.key_tokens"])
    for share in (1.0, 0.5):
        four = logits_of(model_of_share(source.config.model, share), taken(grouped, share))
        single = logits_of(model_of_share(one.config.model, share), taken(plain, share, groups=1))
        assert (four - single).abs().max() < 1e-13 * four.abs().max(), share


def test_rows_of_masters_and_moments_move_with_their_weights() -> None:
    model = tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=32, ffn=48, groups=GROUPS))
    rows = torch.arange(48.0)

    def parameter(scale: float) -> ParameterState:
        values = rows.unsqueeze(1).expand(48, 3)
        return ParameterState(values * scale, values + 0.5, {"exp_avg": values + 0.25, "exp_avg_sq": values**2}, 7.0)

    layer = LayerState("layers.0", {"mlp.key_tokens": parameter(1.0), "mlp.value_tokens": parameter(2.0)})
    half = with_tokens_of(layer, model, model_of_share(model, 0.5))
    expected = torch.cat([rows[group : group + 6] for group in range(0, 48, 12)])
    one = in_groups(half, model_of_share(model, 0.5), 1)
    for found, order in ((half, expected), (one, expected.view(4, 6).T.flatten())):
        for name, scale in (("mlp.key_tokens", 1.0), ("mlp.value_tokens", 2.0)):
            state = found[name]
            assert state.master is not None and state.step == 7.0
            assert torch.equal(state.weight[:, 0], scale * order)
            assert torch.equal(state.master[:, 0], order + 0.5)
            assert torch.equal(state.moments["exp_avg"][:, 0], order + 0.25)
            assert torch.equal(state.moments["exp_avg_sq"][:, 0], order**2)


REFUSED = {
    "share above 1": (["--share", "1.5"], r"--share 1.5: expected a part of the tokens above 0 and up to 1"),
    "share of 0": (["--share", "0"], r"--share 0: expected"),
    "no whole tokens": (["--share", "0.3"], r"share 0.3: takes no whole number of tokens of each of the 4 groups of "
                        r"qkv_slot_num 32. Nearest: 0.25 \(8 tokens\)"),
    "more than there is": (["--ffn", "64"], "ffn_slot_num: 64 tokens are asked for, and there are 48"),
    "uneven groups": (["--ffn", "30"], "ffn_slot_num: 30 tokens do not split evenly over param_token_groups 4"),
    "no size": ([], "size: give either --share, or counts"),
    "two sizes": (["--share", "0.5", "--ffn", "24"], "size: give either --share, or counts"),
    "groups": (["--share", "0.5", "--groups", "5"], "does not split into param_token_groups 5 equal blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_extracted_is_refused(case: str, call: Call, tmp_path: Path) -> None:
    words, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        call(extract, *words)
    assert not list(tmp_path.glob("out*/global_step*"))


def test_a_model_without_parameter_tokens_is_refused(tmp_path: Path, dataset: Path) -> None:
    other = make_checkpoint(write_yaml(tmp_path, PYTHIA | {"data_path": str(dataset)}))
    for tool in (extract, prune):
        with pytest.raises(ConfigError, match="gpt_neox has no parameter tokens"):
            tool.main(["--input_dir", str(other.path), "--output_dir", str(tmp_path / "out"), "--share", "0.5"])


def test_growth_wants_one_group_and_then_grows(call: Call) -> None:
    with pytest.raises(ConfigError, match=r"param_token_groups: 4: zero_key appends .* --share 1 --groups 1"):
        call(grow, "--factor", "2")
    half = call(extract, "--share", "0.5", "--groups", "1")
    grown = call(grow, "--factor", "2", given=half)
    assert grown.config.model.param_tokens is not None and grown.config.model.param_tokens.ffn == 48


@pytest.mark.parametrize("theta", THETAS)
def test_tokens_in_the_order_of_their_importance_compute_the_same(theta: str, tmp_path: Path, dataset: Path) -> None:
    """Logits agree to 1e-13 in float64; keys and values stay together; every share is the most important part."""
    keys = KEYS | {"data_path": str(dataset), "norm_activation_type": theta}
    source = make_checkpoint(write_yaml(tmp_path, keys))
    output = tmp_path / "ordered"
    words = ["--input_dir", str(source.path), "--output_dir", str(output), "--share", "1", "--sequences", "8"]
    assert prune.main(words) == 0
    ordered = read_checkpoint(output / source.path.name)
    before, after = read_weights(source), read_weights(ordered)
    old, new = logits_of(source.config.model, before), logits_of(ordered.config.model, after)
    assert (old - new).abs().max() < 1e-13 * old.abs().max()
    importance = token_importance(ordered, "activation", [tokens()])
    # The text is another one; order the model by the importance that is measured here, and look at that order.
    again = by_importance(ordered, importance, ordered.config.model)
    weights = {name: weight for layer in again.layers() for name, weight in layer.weights().items()}
    for name, important in importance.items():
        kept = taken({f"{name}.key_tokens": weights[f"{name}.key_tokens"]}, 0.5)[f"{name}.key_tokens"]
        best = after[f"{name}.key_tokens"][important.argsort(descending=True)[: len(kept)]]
        assert {tuple(row) for row in kept.tolist()} == {tuple(row) for row in best.tolist()}, name
        kinds = [f"{name}.{kind}_tokens" for kind in ("key", "value")]
        rows = [torch.cat([of[kind] for kind in kinds], dim=1) for of in (before, weights)]
        pairs = [{tuple(row) for row in joined.tolist()} for joined in rows]
        assert pairs[0] == pairs[1], name


def test_importance_is_that_of_plain_torch(source: Checkpoint) -> None:
    """Activation: of the first projection, written out. Gradient: by autograd through a model written out, float64."""
    weights = {name: weight.double() for name, weight in read_weights(source).items()}
    text = tokens()
    x = weights["embedding.word_embeddings.weight"][text]
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    name = "layers.0.attention.query"
    scores = h @ weights[f"{name}.key_tokens"].T
    normal = math.sqrt(32) * scores / scores.norm(dim=-1, keepdim=True)
    activations = normal * 0.5 * (1 + torch.erf(normal / math.sqrt(2)))
    by_hand = activations.abs().mean((0, 1)) * weights[f"{name}.value_tokens"].norm(dim=-1)
    found = token_importance(source, "activation", [text[:1], text[1:2], text[2:]])
    torch.testing.assert_close(found[name].double(), by_hand, rtol=1e-5, atol=0.0)

    expected = torch.zeros(48, dtype=torch.float64)
    for sequence in text:
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        logits = tokenformer(leaves, sequence[None], KEYS)
        F.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        change = torch.zeros(48, dtype=torch.float64)
        for kind in ("key", "value"):
            leaf = leaves[f"layers.1.mlp.{kind}_tokens"]
            assert leaf.grad is not None
            change += (leaf.grad * leaf.detach()).sum(-1)
        expected += change.abs() / len(text)
    found = token_importance(source, "gradient", [text])
    torch.testing.assert_close(found["layers.1.mlp"].double(), expected, rtol=1e-3, atol=1e-7)


def test_pruning_keeps_the_scale_and_shows_the_recomputed_one(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = call(prune, "--share", "0.5", "--sequences", "8", "--measure", "gradient")
    said = capsys.readouterr().out
    model = small.config.model
    assert model.param_tokens is not None and model.param_tokens.qkv_scale_base == 32
    recomputed = with_recomputed_scale(model).param_tokens
    assert recomputed is not None and recomputed.qkv_scale_base == 16
    assert "under the scale of the whole model, and to" in said and "under a recomputed one" in said
    assert "qkv_slot_num=16 proj_slot_num=16 ffn_slot_num=24 qkv_scale_base=32" in said
    short = tmp_path / "short.txt"
    short.write_text("few words of text")
    with pytest.raises(DataError, match="importance is measured on those after them"):
        call(prune, "--share", "0.5", "--text", str(short))
