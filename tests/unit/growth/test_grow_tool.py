"""tools/ckpts/grow.py as users call it: any layout in and out, its table, its measurement, and what it refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.checkpointing.states.read_states import StateReader, read_states, read_weights
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import Checkpoint, read_checkpoint
from megatron.config.sections.growth import GrowthRules, ModelSizes
from megatron.errors import CheckpointError, ConfigError, DataError, UserError
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator
from megatron.loaded_model.loaded_model import load_model
from megatron.model.causal_lm import build_local
from megatron.mpu.context import ParallelContext
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.covers import covered
from tests.helpers.tiny_checkpoints import MODELS, VOCAB, make_checkpoint, tokens, write_yaml
from tools.ckpts import grow, inspect_checkpoint

CASES: dict[str, list[str]] = {
    "zero_key": ["--qkv", "32", "--ffn", "64"],
    "mask_ramp": ["--factor", "1.5", "--operator", "mask_ramp", "--ramp_iters", "10"],
    "copy": ["--factor", "3", "--operator", "copy", "--perturb", "0.2"],
    "insert": ["--num_layers", "5", "--operator", "insert"],
}
"""Growths that preserve the function."""
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
"""(tensor, pipe) parallel sizes."""
Case = tuple[str, str, tuple[int, int], tuple[int, int]]
ALL: list[Case] = [
    case
    for case in itertools.product(CASES, MODELS, LAYOUTS, LAYOUTS)
    if GROWTH_OPERATORS[case[0]].is_exact(MODELS[case[1]].get("norm_activation_type"))
]
COVER: list[Case] = [
    ("zero_key", "l2_norm_gelu", (2, 1), (1, 2)), ("zero_key", "gelu_l2_norm", (1, 2), (2, 1)),
    ("mask_ramp", "gelu_l2_norm", (1, 1), (2, 1)), ("copy", "l2_norm_gelu", (1, 2), (1, 1)),
    ("copy", "softmax", (2, 1), (2, 1)), ("copy", "gelu_l2_norm", (1, 1), (1, 2)),
    ("insert", "softmax", (1, 2), (2, 1)), ("insert", "pythia", (2, 1), (1, 1)), ("insert", "gpt2", (2, 1), (1, 2)),
    ("insert", "llama", (2, 1), (1, 2)),
]  # fmt: skip


class Folder:
    """A checkpoint of a tiny model, and what is made of it."""

    def __init__(self, path: Path, dataset: Path, keys: dict[str, Any], tensor: int = 1, pipe: int = 1) -> None:
        self.path = path
        self.keys = keys | {"data_path": str(dataset)}
        self.source = make_checkpoint(write_yaml(path, self.keys), tensor=tensor, pipe=pipe)

    def config(self, **changes: Any) -> str:
        path = self.path / "target.yml"
        path.write_text(yaml.safe_dump({"make_vocab_size_divisible_by": 100} | self.keys | changes))
        return str(path)

    def grow(self, *words: str, name: str = "grown", source: Path | None = None) -> Checkpoint:
        folders = ["--input_dir", str(source or self.source.path), "--output_dir", str(self.path / name)]
        assert grow.main([*folders, *words]) == 0
        return read_checkpoint(self.path / name / (source or self.source.path).name)


@pytest.fixture
def folder(tmp_path: Path, dataset: Path) -> Folder:
    return Folder(tmp_path, dataset, TOKENFORMER)


def logits_of(checkpoint: Checkpoint, *, fold: bool = False) -> Tensor:
    """By the whole weights of the files; with `fold`, as what does not train reads them."""
    config = checkpoint.config
    if fold:
        return load_model(config, checkpoint, ParallelContext.single(), torch.device("cpu")).logits(tokens())
    model = build_local(config.model, VOCAB, seed=None).eval()
    model.load_state_dict(read_weights(checkpoint), strict=True)
    with torch.no_grad():
        logits: Tensor = model(tokens())
    return logits


@pytest.mark.parametrize(
    ("case", "model", "source", "target"),
    [case if case in COVER else pytest.param(*case, marks=pytest.mark.full) for case in ALL],
)
def test_exact_growth_changes_no_logit_in_any_layout(
    case: str, model: str, source: tuple[int, int], target: tuple[int, int], tmp_path: Path, dataset: Path
) -> None:
    folder = Folder(tmp_path, dataset, MODELS[model], *source)
    layout = [f"model_parallel_size={target[0]}", f"pipe_parallel_size={target[1]}"]
    # The layers of this one know their place, so that none may move.
    place = ["--insert_at", "top"] if model == "gpt2" else []
    grown = folder.grow(*CASES[case], *place, "--config_file", folder.config(), *layout)
    assert (grown.state.tensor_parallel_size, grown.state.pipe_parallel_size) == target
    before, after = logits_of(folder.source), logits_of(grown, fold=True)
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("case", covered([*CASES, "published"], ["copy"]))
def test_growth_of_two_tensor_ranks_is_that_of_one(case: str, tmp_path: Path, dataset: Path) -> None:
    words = CASES.get(
        case, ["--factor", "2", "--operator", "published", "--moments", "reset_all", "--schedule", "restart"]
    )
    grown = []
    for tensor in (1, 2):
        path = tmp_path / str(tensor)
        path.mkdir()
        grown.append(Folder(path, dataset, TOKENFORMER, tensor).grow(*words))
    one, two = map(read_weights, grown)
    assert grown[1].state.tensor_parallel_size == 2, "without a configuration the checkpoint's layout holds"
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_table_and_what_to_train_on_with(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.grow("--ffn", "96")
    sizes = [600 * 32 + 2 * 2 * 32 * (3 * 24 + 40 + ffn) + 2 * 32 for ffn in (48, 96)]
    *table, change, written, advice = capsys.readouterr().out.splitlines()
    assert [line.split() for line in table[1:]] == [
        ["embedding", "19,200", "0"],
        ["layers.0", "to", "layers.1", "24", "40", "48", ">", "96", "10,240", ">", "13,312", "96"],
        ["final_norm", "64", "0"],
    ]
    assert change.startswith("On 64 tokens, logits change by at most 0.0e+00 of the largest, and the loss from ")
    assert f"grown by zero_key from {sizes[0]:,} to {sizes[1]:,} parameters" in written
    keys = advice.removeprefix("Train on with: ").split()
    assert {"ffn_slot_num=96", "ffn_scale_base=48", "qkv_slot_num=24", "qkv_scale_base=24"} < set(keys)
    folder.grow("--num_layers", "4", "--operator", "stack", name="deep")
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in table[3:5]] == [
        ["layers.2", "new", "(layers.0)"],
        ["layers.3", "new", "(layers.1)"],
    ]


def test_the_record_says_what_happened(folder: Folder) -> None:
    first = folder.grow("--ffn", "64", "--moments", "reset_new", "--learning_rate", "rewarm_new", "--rewarm_iters", "5")
    assert first.state.iteration == 7 and first.state.schedule_steps == folder.source.state.schedule_steps
    (record,) = first.state.growth
    assert (record.iteration, record.tokens, record.new_layers) == (7, 7 * 8 * 16, ())
    assert record.before == ModelSizes(qkv=24, proj=40, ffn=48, num_layers=2)
    assert record.after == ModelSizes(qkv=24, proj=40, ffn=64, num_layers=2)
    assert record.rules == GrowthRules(moments="reset_new", learning_rate="rewarm_new", rewarm_iters=5)
    words = ["--num_layers", "3", "--operator", "insert", "--data", "restart", "--schedule", "restart"]
    second = folder.grow(*words, name="again", source=first.path)
    assert second.state.growth[0] == record and second.state.growth[1].new_layers == (1,)
    assert (second.state.consumed_train_samples, second.state.schedule_steps, second.state.iteration) == (0, 0, 7)
    third = folder.grow("--num_layers", "4", "--operator", "insert", name="third", source=second.path)
    assert third.state.growth[2].tokens == 7 * 8 * 16, "tokens that were read before the data restarted count"


def test_inspection_shows_growths(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    grown = folder.grow("--qkv", "32", "--ffn", "64")
    capsys.readouterr()
    assert inspect_checkpoint.main([str(grown.path), "--no-tensors"]) == 0
    assert "  grown           at step 7 by zero_key: qkv 24 > 32, ffn 48 > 64\n" in capsys.readouterr().out
    assert inspect_checkpoint.main([str(grown.path), "--no-tensors", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["state"]["growth"]
    assert record["rules"]["operator"] == "zero_key"


@pytest.mark.parametrize("text", ["a text of the tokenizer's own, long enough to fill a sequence or two", "ab"])
def test_tokens_of_a_text(text: str, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder.path / "text.txt"
    path.write_text(text)
    folder.grow("--ffn", "96", "--text", str(path))
    assert f"On {min(len(text) // 16 * 16, 64) or len(text)} tokens" in capsys.readouterr().out


def test_the_loss_is_that_of_the_model(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """An operator that changes the function is measured against the whole models, made of the files."""
    path = folder.path / "text.txt"
    path.write_bytes(bytes(tokens()[0].clamp(max=127).tolist()))
    ids = tokens()[:1].clamp(max=127)
    grown = folder.grow("--factor", "2", "--operator", "random", "--text", str(path))
    losses, logits = [], []
    for checkpoint in (folder.source, grown):
        model = build_local(checkpoint.config.model, VOCAB, seed=None).double()
        model.load_state_dict(read_weights(checkpoint))
        with torch.no_grad():
            logits.append(model(ids))
        losses.append(float(torch.nn.functional.cross_entropy(logits[-1][0, :-1], ids[0, 1:])))
    change = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    expected = f"{change:.1e} of the largest, and the loss from {losses[0]:.4f} to {losses[1]:.4f}"
    assert expected in capsys.readouterr().out


class Broken(TokenOperator):
    """Promises what it does not keep."""

    def is_exact(self, theta: str | None) -> bool:
        return True

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        return with_new_rows(layer, growth, keys="initial", values="initial")


@pytest.fixture
def broken() -> Iterator[None]:
    GROWTH_OPERATORS.register("broken")(Broken())
    yield
    GROWTH_OPERATORS.unregister("broken")


@pytest.mark.usefixtures("broken")
def test_a_broken_promise_is_found_before_anything_is_written(folder: Folder) -> None:
    with pytest.raises(CheckpointError, match=r"broken preserves the function, but logits changed by .*Nothing was"):
        folder.grow("--ffn", "96", "--operator", "broken")
    assert not (folder.path / "grown").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--ffn", "40"], ConfigError, "ffn_slot_num: 40 is fewer than the checkpoint's 48. .* use 48 or more"),
        (["--ffn", "48"], ConfigError, "nothing to grow"),
        (["--factor", "0.5"], ConfigError, "factor: 0.5: expected a number above 1"),
        (["--factor", "nan"], ConfigError, "factor: nan: expected a number above 1"),
        (["--factor", "2", "--ffn", "96"], ConfigError, "give either it or sizes"),
        (["--ffn", "50", "--operator", "copy"], ConfigError, "Nearest valid values: 48 and 96"),
        (["--num_layers", "3", "--operator", "stack"], ConfigError, "Nearest valid values: 2 and 4; or use insert"),
        (["--ffn", "96", "--operator", "copy", "--perturb", "-1"], ConfigError, "--perturb -1.0: expected a number"),
        (["--ffn", "96", "--ramp_iters", "4"], ConfigError, "It is a rule of mask_ramp"),
        (["--ffn", "96", "--text", "no/such.txt"], DataError, "--text: no/such.txt cannot be read"),
        (["--ffn", "96", "--data_path", "no/such"], DataError, "no/such"),
    ],
)  # fmt: skip
def test_sizes_and_rules_that_are_refused(
    words: list[str], error: type[UserError], message: str, folder: Folder
) -> None:
    with pytest.raises(error, match=message):
        folder.grow(*words)
    assert not (folder.path / "grown").exists()


@pytest.mark.parametrize("place", ["spread", "bottom"])
def test_layers_that_know_their_place_may_not_move(place: str, tmp_path: Path, dataset: Path) -> None:
    """Unless their scores do not depend on it: then the same growth changes no logit."""
    words = ["--num_layers", "5", "--operator", "insert", "--insert_at", place]
    folder = Folder(tmp_path, dataset, MODELS["gpt2"])
    with pytest.raises(
        ConfigError,
        match=f"insert_at: {place}: it moves layers, and scale_attn_by_inverse_layer_idx.*Use insert_at: top",
    ):
        folder.grow(*words)
    assert not (folder.path / "grown").exists()
    (tmp_path / "unscaled").mkdir()
    unscaled = Folder(tmp_path / "unscaled", dataset, MODELS["gpt2"] | {"scale_attn_by_inverse_layer_idx": False})
    before, after = logits_of(unscaled.source), logits_of(unscaled.grow(*words))
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()


def test_a_stack_of_scaled_layers_is_the_stack(tmp_path: Path, dataset: Path) -> None:
    """Every copy has the weights of its source; positions, embedding and final norm are as they were."""
    folder = Folder(tmp_path, dataset, MODELS["gpt2"])
    old = read_weights(folder.source)
    new = read_weights(folder.grow("--num_layers", "6", "--operator", "stack"))
    assert len(new) == len(old) + 3 * 12
    for name, weight in new.items():
        stack, number, *local = name.split(".")
        source = ".".join([stack, str(int(number) % 3), *local]) if stack == "layers" else name
        assert torch.equal(weight, old[source]), name


LARGE = {"qkv_slot_num": 32, "ffn_slot_num": 64, "qkv_scale_base": 24, "ffn_scale_base": 48}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_slot_num": 40}, "ffn_slot_num: 40 is fewer than the checkpoint's 48"),
        ({"ffn_scale_base": 64}, "Set `ffn_scale_base: 48`"),
        ({"hidden_size": 64}, "hidden_size: checkpoint 32, configuration 64"),
        ({"num_layers": 3}, "num_layers: checkpoint 2, configuration 3, and zero_key adds parameter tokens"),
        ({"norm_activation_type": "gelu_l2_norm"}, "theta.*gelu_l2_norm"),
        ({"ffn_slot_num": 63, "model_parallel_size": 2}, r"ffn_slot_num: 63.* does not split over model_pa"),
        (PYTHIA, "architecture: checkpoint tokenformer, configuration gpt_neox"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(changes: dict[str, Any], message: str, folder: Folder) -> None:
    keys = changes if changes is PYTHIA else LARGE | changes
    if changes is PYTHIA:
        folder.keys = {"data_path": folder.keys["data_path"]}
    with pytest.raises(ConfigError, match=message):
        folder.grow("--config_file", folder.config(**keys))
    assert not (folder.path / "grown").exists()


def test_sizes_do_not_hide_what_else_a_configuration_changes(folder: Folder) -> None:
    with pytest.raises(ConfigError, match="hidden_size: checkpoint 32, configuration 64"):
        folder.grow("--config_file", folder.config(hidden_size=64), "--ffn", "96")
    assert not (folder.path / "grown").exists()


def test_counts_that_do_not_split_over_the_ranks_are_refused(tmp_path: Path, dataset: Path) -> None:
    folder = Folder(tmp_path, dataset, TOKENFORMER, tensor=2)
    with pytest.raises(ConfigError, match="ffn_slot_num: 63: does not split over model_parallel_size 2; nearest valid"):
        folder.grow("--ffn", "63")
    assert not (tmp_path / "grown").exists()


def test_without_a_dataset_the_flags_are_named(tmp_path: Path) -> None:
    make_checkpoint(write_yaml(tmp_path, TOKENFORMER))
    words = ["--input_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "grown"), "--factor", "2"]
    with pytest.raises(ConfigError, match="Give --data_path PREFIX or --text FILE"):
        grow.main(words)
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize("damage", ["file", "manifest", "hidden"])
def test_unfinished_checkpoints_are_refused(damage: str, folder: Folder) -> None:
    run, source = folder.source.path.parent, folder.source.path
    if damage == "file":
        (source / "layer_02-model_00-model_states.pt").unlink()
    elif damage == "manifest":
        (source / "manifest.json").unlink()
    else:  # as a killed save leaves it
        source.rename(run / f".{source.name}.writing")
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is whole|holds no checkpoint"):
        folder.grow("--factor", "2", source=run)
    assert not (folder.path / "grown").exists()


def test_what_to_grow_to_must_be_said(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        folder.grow()
    assert "what to grow to is missing: give --factor, sizes such as --ffn" in capsys.readouterr().err


def in_mid_ramp(folder: Folder, steps: int) -> Checkpoint:
    """A checkpoint of mask_ramp, `steps` of 10 steps later; what is new is still as it was drawn."""
    grown = folder.grow(*CASES["mask_ramp"])
    state = replace(grown.state, iteration=7 + steps)
    header = replace(RunHeader.of(StateReader(grown)), state=state)
    output = folder.path / "ramp"
    return read_checkpoint(write_states(read_states(grown), grown.config, ParallelSizes(), output, header))


def test_what_does_not_train_reads_an_unfinished_ramp_as_keys(folder: Folder) -> None:
    """Generation and evaluation, an export, and the next growth: new keys count by 4 tenths there."""
    ramp = in_mid_ramp(folder, steps=4)
    weights = read_weights(ramp)
    for name, tensor in weights.items():
        rows = 48 if ".mlp." in name else 40 if ".proj." in name else 24
        if name.endswith("key_tokens"):
            weights[name] = torch.cat([tensor[:rows], tensor[rows:] * 0.4])
    model = build_local(ramp.config.model, VOCAB, seed=None).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        expected = model(tokens())
    assert (logits_of(folder.source) - expected).abs().max() > 1e-2, "the ramp has changed something"
    assert (logits_of(ramp, fold=True) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = folder.grow("--factor", "2", name="again", source=ramp.path)
    assert len(again.state.growth) == 2
    assert (logits_of(again) - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Imports transformers.
    from transformers import AutoModelForCausalLM

    from tests.helpers.tiny_checkpoints import export

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(export(ramp, folder.path / "hf"))(tokens()).logits
    assert (theirs - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("case", ["zero_key", pytest.param("copy", marks=pytest.mark.full)])
def test_a_grown_model_goes_to_transformers_and_back(case: str, folder: Folder) -> None:
    """With its scale, which is not that of its counts: the same logits there, and the same weights again here."""
    from transformers import AutoModelForCausalLM

    from megatron.hf.import_folder import import_folder
    from tests.helpers.tiny_checkpoints import export

    grown = folder.grow(*CASES[case])
    exported = export(grown, folder.path / "hf")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(exported)(tokens()).logits
    ours = logits_of(grown)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    import_folder(exported, grown.config, folder.path / "imported")
    again = read_checkpoint(folder.path / "imported" / "global_step0")
    assert again.config.model.param_tokens == grown.config.model.param_tokens
    want, got = read_weights(grown), read_weights(again)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
