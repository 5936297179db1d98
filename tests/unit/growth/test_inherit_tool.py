"""tools/ckpts/inherit.py as users call it: bitwise copies in any layout, its table, what it draws, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.architecture import ARCHITECTURES
from megatron.errors import CheckpointError, ConfigError, UserError
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS
from megatron.model.causal_lm import LocalCausalLM, build_local
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import VOCAB, export, make_checkpoint, read_run, tokens, write_yaml
from tests.helpers.tokenizer_files import write_tokenizers
from tools.ckpts import inherit

DEPTH = 4
MODELS: dict[str, dict[str, Any]] = {
    # Scales that an earlier growth has pinned.
    "tokenformer": TOKENFORMER | {"num_layers": DEPTH, "qkv_scale_base": 12, "ffn_scale_base": 16},
    "gpt_neox": PYTHIA | {"num_layers": DEPTH},
    "gpt2": GPT2 | {"num_layers": DEPTH},
    "llama": LLAMA | {"num_layers": DEPTH},
}
"""A reference of each architecture."""
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""(tensor, pipe) parallel sizes."""


class Folder:
    """The checkpoint of a tiny reference, and what is made of it."""

    def __init__(self, path: Path, dataset: Path, keys: dict[str, Any], tensor: int = 1, pipe: int = 1) -> None:
        self.path = path
        self.keys = {"make_vocab_size_divisible_by": 100, **keys, "data_path": str(dataset)}
        self.source = make_checkpoint(write_yaml(path, self.keys), tensor=tensor, pipe=pipe)

    def config(self, **changes: Any) -> str:
        path = self.path / "target.yml"
        path.write_text(yaml.safe_dump(self.keys | changes))
        return str(path)

    def inherit(self, *words: str, name: str = "inherited", source: Path | None = None) -> Checkpoint:
        folders = ["--input_dir", str(source or self.source.path), "--output_dir", str(self.path / name)]
        assert inherit.main([*folders, *words]) == 0
        return read_checkpoint(self.path / name / "global_step0")


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, dataset: Path) -> Folder:
    return Folder(tmp_path, dataset, MODELS[request.param])


@pytest.fixture(
    params=["tokenformer", *[pytest.param(name, marks=pytest.mark.full) for name in MODELS if name != "tokenformer"]]
)
def covered(request: pytest.FixtureRequest, tmp_path: Path, dataset: Path) -> Folder:
    """One architecture, and the others in full."""
    return Folder(tmp_path, dataset, MODELS[request.param])


@pytest.fixture
def tokenformer(tmp_path: Path, dataset: Path) -> Folder:
    return Folder(tmp_path, dataset, MODELS["tokenformer"])


def module_of(checkpoint: Checkpoint) -> LocalCausalLM:
    model = build_local(checkpoint.config.model, VOCAB, seed=None).eval()
    model.load_state_dict(read_weights(checkpoint), strict=True)
    return model


@torch.no_grad()
def streams(model: LocalCausalLM) -> list[Tensor]:
    """The residual stream after the embedding and after each layer."""
    found = [model.embedding(tokens())]
    for layer in model.layers:
        found.append(layer(found[-1]))
    return found


def expected_sources(target: dict[str, Tensor], layers: list[int]) -> dict[str, str]:
    """The reference's name of every parameter of a model that is made of `layers`."""
    return {
        name: re.sub(r"^layers\.(\d+)", lambda match: f"layers.{layers[int(match.group(1))]}", name) for name in target
    }


def test_every_architecture_here_is_tested() -> None:
    """Another one needs its reference above, and the dimensions of its weights in its facts."""
    shipped = {name for name in ARCHITECTURES if not name.startswith("mixed")}
    assert shipped == set(MODELS)
    assert all(ARCHITECTURES[name].axes for name in MODELS)


COVER = [("first", "tokenformer", (2, 1), (1, 2)), ("1,3", "gpt_neox", (1, 2), (2, 1)),
         ("last", "tokenformer", (1, 1), (2, 2))]  # fmt: skip
LAYERS = {"first": [0, 1], "last": [2, 3], "1,3": [1, 3]}


@pytest.mark.parametrize(
    ("layers", "model", "source", "target"),
    [
        case if case in COVER else pytest.param(*case, marks=pytest.mark.full)
        for case in ((k, m, s, t) for k in LAYERS for m in MODELS for s in LAYOUTS for t in LAYOUTS)
    ],
)
def test_inherited_tensors_are_their_sources_bit_for_bit_in_any_layout(
    layers: str, model: str, source: tuple[int, int], target: tuple[int, int], tmp_path: Path, dataset: Path
) -> None:
    folder = Folder(tmp_path, dataset, MODELS[model], *source)
    layout = [f"model_parallel_size={target[0]}", f"pipe_parallel_size={target[1]}"]
    made = folder.inherit("--layers", layers, "--config_file", folder.config(num_layers=2), *layout)
    assert (made.state.tensor_parallel_size, made.state.pipe_parallel_size) == target
    theirs, ours = read_weights(folder.source), read_weights(made)
    assert len({name.split(".")[1] for name in ours if name.startswith("layers.")}) == 2
    for name, source_name in expected_sources(ours, LAYERS[layers]).items():
        assert torch.equal(ours[name], theirs[source_name]), name


def test_the_first_layers_compute_what_they_do_in_the_reference(folder: Folder) -> None:
    """Exactly: the same operations on the same numbers. And the end of the model is the reference's."""
    made = folder.inherit("--num_layers", "3")
    reference, model = module_of(folder.source), module_of(made)
    theirs, ours = streams(reference), streams(model)
    assert len(ours) == 4 and all(map(torch.equal, ours, theirs[:4]))
    assert torch.equal(model.final_norm(ours[-1]), reference.final_norm(theirs[3]))
    if made.config.model.param_tokens is not None:
        assert made.config.model.param_tokens == folder.source.config.model.param_tokens
        assert made.config.model.param_tokens.ffn_scale_base == 16


def test_the_table_names_every_tensor(tokenformer: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    made = tokenformer.inherit("--layers", "0,1,3", "--sublayers", "attention", "norms")
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line and "." in line.split()[0]}
    named = set()
    for name in lines:
        span = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else [None]
        named |= {re.sub(r"\{.*\}", str(number), name) for number in numbers}
    assert named >= set(read_weights(made))
    assert re.search(r"layers\.\{0\.\.1\}\.attention\.query\.key_tokens +24 x 32 +layers\.\{0\.\.1\}\.attention", shown)
    assert re.search(r"layers\.2\.attention\.query\.key_tokens +24 x 32 +layers\.3\.attention", shown)
    assert re.search(r"layers\.2\.mlp\.key_tokens +48 x 32 +initial values, seed 7", shown)
    assert "layers of the reference that are left out: 2" in shown
    assert re.search(r"On [\d,]+ tokens the loss of the reference is \d", shown)


@pytest.mark.parametrize(
    ("words", "drawn"),
    [
        (["--num_layers", "2", "--sublayers", "attention"], r"layers\.\d+\.(mlp|\w*layernorm)\."),
        (["--num_layers", "2", "--sublayers", "feed_forward", "norms"], r"layers\.\d+\.attention\."),
        (["--num_layers", "6", "--operator", "random"], r"layers\."),
    ],
)
def test_what_is_not_inherited_begins_as_in_a_run_of_the_configuration(
    words: list[str], drawn: str, covered: Folder
) -> None:
    made = covered.inherit(*words)
    fresh = dict(build_local(made.config.model, VOCAB, made.config.training.seed).named_parameters())
    theirs, ours = read_weights(covered.source), read_weights(made)
    kinds = {name: bool(re.match(drawn, name)) for name in ours}
    assert len(set(kinds.values())) == 2
    for name, is_drawn in kinds.items():
        assert torch.equal(ours[name], fresh[name].detach() if is_drawn else theirs[name]), name


def test_a_hybrid_stack_is_a_block_of_the_reference_over_and_over(covered: Folder) -> None:
    for words, layers in (
        (["--num_layers", "6"], [0, 1, 2, 0, 1, 2]),
        (["--num_layers", "4", "--layers", "last"], [2, 3, 2, 3]),
        (["--num_layers", "6", "--layers", "1,3"], [1, 3] * 3),
    ):
        made = covered.inherit(*words, "--operator", "hybrid_stack", name="-".join(words))
        theirs, ours = read_weights(covered.source), read_weights(made)
        for name, source in expected_sources(ours, layers).items():
            assert torch.equal(ours[name], theirs[source]), (words, name)


ROWS = {"first": [0, 1], "last": [2, 3], "even": [0, 2]}
"""Heads that are kept of four."""


@pytest.mark.parametrize("rows", ["even", *[pytest.param(rows, marks=pytest.mark.full) for rows in ("first", "last")]])
def test_half_of_the_width_keeps_heads_whole(rows: str, folder: Folder) -> None:
    made = folder.inherit("--operator", "half_width", "--rows", rows)
    theirs, ours = read_weights(folder.source), read_weights(made)
    features = {"first": slice(0, 16), "last": slice(16, 32), "even": slice(0, 32, 2)}[rows]
    heads = torch.cat([torch.arange(8) + 8 * head for head in ROWS[rows]])
    assert torch.equal(
        ours["embedding.word_embeddings.weight"], theirs["embedding.word_embeddings.weight"][:, features]
    )
    assert torch.equal(ours["final_norm.weight"], theirs["final_norm.weight"][features])
    if "layers.1.mlp.key_tokens" in ours:
        query, out = "layers.1.attention.query.", "layers.1.attention.proj."
        assert torch.equal(ours[query + "key_tokens"], theirs[query + "key_tokens"][:, features])
        assert torch.equal(ours[query + "value_tokens"], theirs[query + "value_tokens"][:, heads])
        assert torch.equal(ours[out + "key_tokens"], theirs[out + "key_tokens"][:, heads])
        assert torch.equal(ours[out + "value_tokens"], theirs[out + "value_tokens"][:, features])
    elif "layers.1.attention.key.weight" in ours:
        group = 1 if rows == "last" else 0
        width = {"query": 16, "key": 8, "value": 8}
        for name, kept in width.items():
            weight = theirs[f"layers.1.attention.{name}.weight"][group * kept : (group + 1) * kept]
            assert torch.equal(ours[f"layers.1.attention.{name}.weight"], weight[:, features]), name
        units = {"first": slice(0, 44), "last": slice(44, 88), "even": slice(0, 88, 2)}[rows]
        assert torch.equal(ours["layers.2.mlp.gate.weight"], theirs["layers.2.mlp.gate.weight"][units][:, features])
        assert torch.equal(ours["layers.2.mlp.down.weight"], theirs["layers.2.mlp.down.weight"][features][:, units])
    elif "layers.1.attention.query_key_value.weight" in ours:
        weight = theirs["layers.1.attention.query_key_value.weight"].unflatten(0, (4, 3, 8))
        wanted = weight[ROWS[rows]].flatten(0, 2)[:, features]
        assert torch.equal(ours["layers.1.attention.query_key_value.weight"], wanted)
        units = {"first": slice(0, 64), "last": slice(64, 128), "even": slice(0, 128, 2)}[rows]
        wanted = theirs["layers.2.mlp.dense_h_to_4h.weight"][units][:, features]
        assert torch.equal(ours["layers.2.mlp.dense_h_to_4h.weight"], wanted)
        assert torch.equal(ours["layers.2.mlp.dense_h_to_4h.bias"], theirs["layers.2.mlp.dense_h_to_4h.bias"][units])


def test_half_of_the_width_preserves_what_it_says(folder: Folder) -> None:
    """A reference whose stream holds everything twice, and whose second half of features, heads and units is not read:
    the narrow model computes the first half of its stream, and its logits."""
    made = folder.inherit("--operator", "half_width", name="narrow")
    narrow = module_of(made).double()
    model = folder.source.config.model
    wide = build_local(model, VOCAB, seed=None).double().eval()
    zeros = {name: torch.zeros_like(weight) for name, weight in wide.named_parameters()}
    axes = ARCHITECTURES[model.architecture].axes
    for name, weight in narrow.named_parameters():
        local = name.split(".", 2)[-1] if name.startswith("layers.") else ""
        kinds = [axis.what for axis in axes[local]] if local in axes else ["rows"] * (weight.dim() - 1) + ["features"]
        place = tuple(slice(0, size) for size in weight.shape)
        zeros[name][place] = weight
        # Features that a weight writes to, or scales, come twice; those that it reads from are read once.
        writes = local in ARCHITECTURES[model.architecture].output_weights or "norm" in name or "embedding" in name
        if writes:
            dim = kinds.index("features") if "features" in kinds else 0
            first, second = list(place), list(place)
            half = weight.shape[dim]
            first[dim], second[dim] = slice(0, half), slice(half, 2 * half)
            zeros[name][tuple(second)] = zeros[name][tuple(first)]
    wide.load_state_dict(zeros)
    theirs, ours = streams(wide), streams(narrow)
    assert ours[-1].shape[-1] == 16 and len(ours) == DEPTH + 1
    for step, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(found, wanted[..., :16], rtol=1e-10, atol=1e-10, msg=lambda m, s=step: f"{s}: {m}")  # type: ignore[misc]


def test_tokens_are_halved_with_their_scale(tokenformer: Folder) -> None:
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "ffn_slot_num": 24}
    words = ["--operator", "half_width", "--config_file"]
    with pytest.raises(ConfigError, match=r"ffn_scale_base: 16: .* 24 tokens need 8. Set `ffn_scale_base: 8`"):
        tokenformer.inherit(*words, tokenformer.config(**narrow))
    made = tokenformer.inherit(*words, tokenformer.config(**narrow, ffn_scale_base=8))
    theirs, ours = read_weights(tokenformer.source), read_weights(made)
    assert torch.equal(ours["layers.3.mlp.value_tokens"], theirs["layers.3.mlp.value_tokens"][:24, :16])


def test_a_hugging_face_folder_is_a_reference(covered: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    hf = export(covered.source, covered.path / "hf")
    words = ["--config_file", covered.config(num_layers=2), "model_parallel_size=2"]
    made = covered.inherit(*words, source=hf)
    assert made.holds_weights_alone and made.state.tensor_parallel_size == 2
    theirs, ours = read_weights(covered.source), read_weights(made)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert f"of {hf} with" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"says nothing of the run. Give --config_file"):
        covered.inherit("--num_layers", "2", source=hf)
    with pytest.raises(ConfigError, match=r"differs in more than its layers: hidden_size: reference 32, configuration"):
        covered.inherit("--config_file", covered.config(num_layers=2, hidden_size=64), source=hf)


REFUSED: list[tuple[list[str], dict[str, Any] | None, type[UserError], str]] = [
    (["--num_layers", "5"], None, ConfigError, "a model of 5 layers needs 5 layers of the reference, which has 4"),
    (["--layers", "0,4"], None, ConfigError, r"the reference has 4 layers, 0 to 3; it has no 4"),
    (["--layers", "0,1"], {"num_layers": 3}, ConfigError, "names 2 layers, and a model of 3 layers needs 3"),
    ([], None, ConfigError, "num_layers: how many layers the model is to have is missing; the reference has 4"),
    ([], {"hidden_size": 64, "num_layers": 2}, ConfigError, r"hidden_size: reference 32, configuration 64"),
    ([], {"padded_vocab_size": 700, "num_layers": 2}, ConfigError, "an embedding of 600 rows"),
    (["--moments", "keep", "--num_layers", "2"], None, ConfigError, "holds weights alone, and nothing of a run"),
    (["--schedule", "continue", "--num_layers", "2"], None, ConfigError, "inherit.schedule: continue: .* Use restart"),
    (["--operator", "hybrid_stack", "--num_layers", "3"], None, ConfigError, "3 is odd"),
    (["--operator", "hybrid_stack", "--layers", "0,1", "--num_layers", "5"], None, ConfigError, "valid: 4 and 6"),
    (
        ["--operator", "random", "--layers", "last"],
        None,
        ConfigError,
        "inherit.layers: last: has no effect with random",
    ),
    (["--rows", "even", "--num_layers", "2"], None, ConfigError, "It is a rule of half_width"),
    (
        ["--operator", "half_width"],
        {"hidden_size": 16, "num_attention_heads": 2, "ffn_slot_num": 47},
        ConfigError,
        r"param_tokens\.ffn: reference 48, configuration 47\. half_width halves .*; half of it is 24",
    ),
]


@pytest.mark.parametrize(("words", "keys", "error", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: list[str], keys: dict[str, Any] | None, error: type[UserError], message: str, tokenformer: Folder
) -> None:
    config = [] if keys is None else ["--config_file", tokenformer.config(**keys)]
    with pytest.raises(error, match=message):
        tokenformer.inherit(*words, *config, name="refused")
    assert not (tokenformer.path / "refused").exists()


def test_another_tokenizer_is_refused(tokenformer: Folder) -> None:
    file = write_tokenizers(tokenformer.path) / "tokenizer.json"
    config = tokenformer.config(num_layers=2, tokenizer_type="HFTokenizer", vocab_file=str(file))
    with pytest.raises(ConfigError, match=r"the configured tokenizer has [\d,]+ ids, and .* was trained with 512"):
        tokenformer.inherit("--config_file", config)
    assert not (tokenformer.path / "inherited").exists()


def test_an_unfinished_reference_is_refused(tokenformer: Folder) -> None:
    (tokenformer.source.path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        tokenformer.inherit("--num_layers", "2", source=tokenformer.source.path.parent)
    assert not (tokenformer.path / "inherited").exists()


def test_a_tensor_without_a_place_is_an_error(tokenformer: Folder) -> None:
    """Whoever adds a parameter outside of the parts of a layer is told where to say what it belongs to."""
    from megatron.growth.inheriting.inherit_checkpoint import Reference, plan_inheritance
    from megatron.growth.inheriting.inherit_operator import inherited_layers

    reference = Reference.of(tokenformer.source)
    rules = inherit.InheritConfig()
    config = read_run(Path(tokenformer.config(num_layers=2)))

    def read(name: str) -> LayerState:
        layer = reference.read(name)
        return layer.replace({"attention.sink": ParameterState(torch.zeros(4))}) if name == "layers.1" else layer

    with pytest.raises(CheckpointError, match=r"layers.1 cannot be made .* left over attention.sink"):
        list(inherited_layers(read, plan_inheritance(reference, config, rules)))


class Reversed(type(INHERIT_OPERATORS["inherit"])):  # type: ignore[misc]
    """A test's own operator: the layers upside down."""

    def source_layers(self, before: int, after: int, rules: Any) -> tuple[int, ...]:
        return tuple(reversed(super().source_layers(before, after, rules)))


def test_an_operator_needs_nothing_but_its_registration(tokenformer: Folder) -> None:
    INHERIT_OPERATORS.register("reversed")(Reversed())
    try:
        ours = read_weights(tokenformer.inherit("--operator", "reversed", "--num_layers", "4"))
    finally:
        INHERIT_OPERATORS.unregister("reversed")
    theirs = read_weights(tokenformer.source)
    for name, source in expected_sources(ours, [3, 2, 1, 0]).items():
        assert torch.equal(ours[name], theirs[source]), name


def test_moments_go_with_what_they_are_of(tokenformer: Folder) -> None:
    """Kept with inherited tensors, zero for drawn ones, zero for second copies by reset_new, zero for all by
    reset_all: see tests/ranks/growth/test_inherit_run.py for files of the optimizer."""
    from megatron.growth.inheriting.inherit_checkpoint import Reference, plan_inheritance
    from megatron.growth.inheriting.inherit_operator import inherited_layers

    reference = Reference.of(tokenformer.source)
    config = read_run(Path(tokenformer.config(num_layers=4)))

    def read(name: str) -> LayerState:
        layer = reference.read(name)
        return layer.replace({
            local: ParameterState(state.weight, state.weight.float(), {"exp_avg": state.weight + 1}, 9.0)
            for local, state in layer.parameters.items()
        })  # fmt: skip

    for moments, zero in (("keep", [0, 0]), ("reset_new", [0, 1]), ("reset_all", [1, 1])):
        rules = inherit.InheritConfig(operator="hybrid_stack", moments=moments, sublayers=["attention"])
        made = {layer.name: layer for layer in inherited_layers(read, plan_inheritance(reference, config, rules))}
        for name, is_zero in zip(("layers.1", "layers.3"), zero, strict=True):
            state = made[name]["attention.proj.key_tokens"]
            assert state.step == (0 if moments == "reset_all" else 9)
            assert torch.equal(
                state.moments["exp_avg"], torch.zeros_like(state.weight) if is_zero else state.weight + 1
            )
            assert not made[name]["mlp.key_tokens"].moments["exp_avg"].any(), "what is drawn has none"


def test_layers_that_are_left_out_are_never_read(tokenformer: Folder) -> None:
    """Files of the reference's other layers are looked at by size and hash alone."""
    model = tokenformer.source.config.model
    names = [layout.name for layout in layer_layouts(model, VOCAB)]
    assert names[1:-1] == [f"layers.{number}" for number in range(DEPTH)]
    from megatron.growth.inheriting.inherit_checkpoint import Reference, plan_inheritance
    from megatron.growth.inheriting.inherit_operator import inherited_layers

    reference, asked = Reference.of(tokenformer.source), []

    def read(name: str) -> LayerState:
        asked.append(name)
        return reference.read(name)

    config = read_run(Path(tokenformer.config(num_layers=2)))
    layers = inherited_layers(read, plan_inheritance(reference, config, inherit.InheritConfig()))
    header = RunHeader.new(VOCAB.actual, {})
    write_states(layers, config, ParallelSizes(), tokenformer.path / "out", header)
    assert asked == ["embedding", "layers.0", "layers.1", "final_norm"]
