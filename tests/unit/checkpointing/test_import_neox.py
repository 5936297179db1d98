"""NeoX's checkpoints in every form: all tensors, logits of independent implementations, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.errors import CheckpointError, ConfigError, DataError, UserError
from megatron.loaded_model.loaded_model import load_model
from megatron.mpu.context import ParallelContext
from tests.helpers.bombs import Bomb
from tests.helpers.commands import run_command
from tests.helpers.configs import TOKENFORMER
from tests.helpers.neox_writer import (
    MODELS,
    ROWS,
    TOKENS,
    Form,
    Weights,
    imported,
    independent_logits,
    neox_weights,
    our_llama,
    our_weights,
    rank_file,
    tokens,
    write_config,
    write_neox,
)
from tools.ckpts import import_neox

Case = tuple[str, Form, int, int, bool]
CASES: list[Case] = [
    (name, form, tensor, pipe, tied)
    for name, form, tensor, pipe, tied in itertools.product(
        MODELS, ("layers", "ranks", "bin", "bin of a pipeline"), (1, 2), (1, 2), (True, False)
    )
    if (form == "layers" or pipe == 1) and ("bin" not in form or tensor == 1)
]
FEW: list[Case] = [
    ("tokenformer", "bin", 1, 1, True), ("tokenformer", "layers", 2, 2, True), ("tokenformer", "ranks", 2, 1, False),
    ("tokenformer", "bin of a pipeline", 1, 1, True), ("tokenformer, split", "layers", 2, 1, False),
    ("tokenformer, split", "ranks", 2, 1, True), ("pythia", "layers", 1, 1, False), ("pythia", "layers", 2, 2, True),
    ("pythia", "ranks", 2, 1, False), ("pythia", "bin of a pipeline", 1, 1, False),
    ("sequential residual", "layers", 2, 1, False), ("sequential residual", "ranks", 1, 1, True),
    ("llama", "layers", 2, 2, False), ("llama, as many heads", "ranks", 2, 1, False),
    ("llama, newer", "bin", 1, 1, True), ("llama, newer", "layers", 2, 1, False),
    ("llama, in between", "ranks", 2, 1, False),
    ("gpt2", "layers", 2, 2, True), ("gpt2", "bin of a pipeline", 1, 1, True), ("gpt2", "ranks", 1, 1, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form", "tensor", "pipe", "tied"),
    [case if case in FEW else pytest.param(*case, marks=pytest.mark.full) for case in CASES],
)
def test_every_form_becomes_the_same_model(
    name: str, form: Form, tensor: int, pipe: int, tied: bool, tmp_path: Path
) -> None:
    settings = MODELS[name] | {"no_weight_tying": not tied}
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, form, tensor=tensor, pipe=pipe)
    words = ["--grouped-query-rows", settings["rows"]] if "rows" in settings else []
    checkpoint = imported(source, write_config(tmp_path, settings), tmp_path / "out", *words)
    got, want = read_weights(checkpoint), our_weights(weights, settings["num_layers"])
    if settings["architecture"] == "llama":
        want = our_llama(weights, settings)
    assert got.keys() == want.keys()
    for parameter, tensor_ in want.items():
        assert got[parameter].dtype == torch.float32
        assert torch.equal(got[parameter], tensor_), parameter
    assert checkpoint.holds_weights_alone
    assert (checkpoint.state.vocab_size, checkpoint.state.padded_vocab_size) == (TOKENS, ROWS)
    with torch.no_grad():
        model = load_model(checkpoint.config, checkpoint, ParallelContext.single(), torch.device("cpu")).module
        logits = model.double()(tokens())
    torch.testing.assert_close(logits, independent_logits(weights, settings), rtol=0, atol=1e-5)


def test_a_run_folder_and_a_folder_of_shards_are_found(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    weights = neox_weights(settings, ROWS)
    config = write_config(tmp_path, settings)
    write_neox(tmp_path / "neox", weights, settings, "layers")
    first = read_weights(imported(tmp_path / "neox", config, tmp_path / "first"))
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(weights)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({f"sequential.{name}": weights[name] for name in names if files[name] == file}, folder / file)
    index = {"weight_map": {f"sequential.{name}": file for name, file in files.items()}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    second = read_weights(imported(folder, config, tmp_path / "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_newer_names_of_the_mlp_and_a_head_split_by_columns(tmp_path: Path) -> None:
    settings = MODELS["pythia"] | {"output_layer_parallelism": "row"}
    weights = neox_weights(settings, ROWS)
    newer = {
        name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2"): tensor
        for name, tensor in weights.items()
    }
    source = write_neox(tmp_path / "neox", newer, settings, "layers", tensor=2)
    config = write_config(tmp_path, MODELS["pythia"])
    got = read_weights(imported(source, config, tmp_path / "out"))
    for name, want in our_weights(weights, 2).items():
        assert torch.equal(got[name], want), name


def test_scales_of_rms_norms_are_read(tmp_path: Path) -> None:
    settings = MODELS["pythia"]
    weights = {
        name.replace("norm.weight", "norm.scale"): tensor
        for name, tensor in neox_weights(settings, ROWS).items()
        if not name.endswith("norm.bias")
    }
    source = write_neox(tmp_path / "neox", weights, settings, "ranks", tensor=2)
    got = read_weights(imported(source, write_config(tmp_path, settings, norm="rmsnorm"), tmp_path / "out"))
    assert torch.equal(got["final_norm.weight"], weights["5.norm.scale"])
    for layer in (0, 1):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert torch.equal(got[f"layers.{layer}.{norm}.weight"], weights[f"{layer + 2}.{norm}.scale"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_format_is_kept(dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MODELS["pythia"]
    weights = {name: tensor.to(dtype) for name, tensor in neox_weights(settings, ROWS).items()}
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    got = read_weights(imported(source, write_config(tmp_path, settings), tmp_path / "out"))
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    want = our_weights(weights, 2)
    for name in want.keys() - {name for name in want if name.endswith(("dense.bias", "4h_to_h.bias"))}:
        assert torch.equal(got[name], want[name]), name
    assert f"in {str(dtype).removeprefix('torch.')}, merged from 2 tensor-parallel ranks" in capsys.readouterr().out


def test_mixed_number_formats_become_one_that_holds_all(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    weights = {
        name: tensor.to(torch.float16 if i % 2 else torch.bfloat16)
        for i, (name, tensor) in enumerate(neox_weights(settings, ROWS).items())
    }
    source = write_neox(tmp_path / "neox", weights, settings, "bin")
    got = read_weights(imported(source, write_config(tmp_path, settings), tmp_path / "out"))
    for name, want in our_weights(weights, 2).items():
        assert torch.equal(got[name], want.float()), name


def test_replicas_that_drifted_apart_are_averaged_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MODELS["pythia"]
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    file = source / "layer_03-model_01-model_states.pt"
    layer = torch.load(file)
    layer["input_layernorm.weight"] += 0.5
    torch.save(layer, file)
    got = read_weights(imported(source, write_config(tmp_path, settings), tmp_path / "out"))
    assert torch.equal(got["layers.1.input_layernorm.weight"], weights["3.input_layernorm.weight"] + 0.25)
    assert (
        "1 replicated parameters differed between tensor-parallel ranks and were averaged; most of all "
        "layers.1.input_layernorm.weight, by 5.0e-01"
    ) in capsys.readouterr().out


def test_biases_that_a_converter_has_divided_are_summed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = MODELS["sequential residual"]
    weights = neox_weights(settings, ROWS)
    biases = [name for name in weights if name.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))]
    divided = weights | {name: weights[name] / 2 for name in biases}
    source = write_neox(tmp_path / "neox", divided, settings, "layers", tensor=2)
    config = write_config(tmp_path, settings)
    names = {our_name: weights[name] for name in biases for our_name in our_weights({name: weights[name]}, 2)}
    for words, factor, said in (
        ([], 0.5, "one of the ranks' replicas, as `gpt_j_residual: false` trains them. What NeoX's converters wrote"),
        (["--row-parallel-biases", "sum"], 1.0, "summed over ranks, as asked for"),
    ):
        output = tmp_path / f"out{len(words)}"
        arguments = ["--input", source, "--config_file", config, "--output_dir", output, *words]
        assert import_neox.main([str(word) for word in arguments]) == 0
        assert f"biases of row-parallel matrices: {said}" in capsys.readouterr().out
        checkpoint = find_checkpoint(output, None, "full")
        assert checkpoint is not None
        got = read_weights(checkpoint)
        assert len(names) == 4
        for name, whole in names.items():
            assert torch.equal(got[name], factor * whole)


@pytest.mark.parametrize("rows", [512, 576, 704])
def test_other_padding_needs_a_masked_vocabulary(rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MODELS["pythia"] | {"make_vocab_size_divisible_by": 64}
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    match = rf"640 rows, the configured model {rows}.*`padded_vocab_size: 640`.*`mask_padded_vocab: true`"
    with pytest.raises(ConfigError, match=match):
        imported(source, write_config(tmp_path, settings, padded_vocab_size=rows), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = write_config(tmp_path, settings, padded_vocab_size=rows, mask_padded_vocab=True)
    got = read_weights(imported(source, config, tmp_path / "out"))
    for name in ("embedding.word_embeddings.weight", "head.weight"):
        want = our_weights(weights, 2)[name]
        assert len(got[name]) == rows
        assert torch.equal(got[name][:TOKENS], want[:TOKENS])
        assert not got[name][TOKENS:].any()
    printed = capsys.readouterr().out
    assert (f"{rows - ROWS} zero rows were added" if rows > ROWS else f"{ROWS - rows} rows were cut off") in printed


def test_rows_of_tokens_are_never_lost(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"] | {"padded_vocab_size": 512, "mask_padded_vocab": True}
    source = write_neox(tmp_path / "neox", neox_weights(settings, 384), settings, "bin")
    with pytest.raises(ConfigError, match=r"384 rows, and the configured tokenizer 512 ids.*vocab_file"):
        imported(source, write_config(tmp_path, settings), tmp_path / "out")


class Unknown:
    """A class of the program that wrote the file."""


def fails(source: Path, config: Path, output: Path, error: type[UserError], match: str) -> None:
    with pytest.raises(error, match=match):
        imported(source, config, output)
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


@pytest.mark.parametrize("form", ["layers", "ranks", "bin"])
def test_malicious_files_do_not_run(form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, form)
    file = source if source.is_file() else sorted(source.glob("layer_*.pt" if form == "layers" else "*.pt"))[-1]
    torch.save(torch.load(file, weights_only=False) | {"bomb": Bomb(Path("exploded"))}, file)
    config = write_config(tmp_path, settings)
    fails(
        source,
        config,
        tmp_path / "out",
        CheckpointError,
        rf"{file.name} holds more.*\(getattr\).*allow_unsafe_load: true",
    )
    with file.open("wb") as opened:
        pickle.dump(Bomb(Path("exploded")), opened)
    fails(source, config, tmp_path / "out", CheckpointError, file.name)
    assert not (tmp_path / "exploded").exists()


def test_an_unknown_class_is_named_and_trusted_only_on_request(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "ranks")
    file = source / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file, weights_only=False) | {"arguments": Unknown()}, file)
    match = r"\(tests\.unit\.checkpointing\.test_import_neox\.Unknown\).*If you trust.*allow_unsafe_load: true"
    fails(source, write_config(tmp_path, settings), tmp_path / "out", CheckpointError, match)
    imported(source, write_config(tmp_path, settings, allow_unsafe_load=True), tmp_path / "out")


Change = Callable[[Weights], object]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda w: w.pop("3.mlp.value_param_tokens"), CheckpointError, r"Missing: mlp\.value_param_tokens of layer 3 "
         r"\(`ffn_slot_num`\)\. Left over: none"),
        (lambda w: w.update({"2.attention.gate.weight": torch.ones(2)}), CheckpointError,
         r"Left over: layer_02-model_00-model_states\.pt: attention\.gate\.weight \(`attention_config`\)"),
        (lambda w: w.update({"9.surprise": torch.ones(2)}), CheckpointError, r"Left over: layer_09-.*: surprise"),
        (lambda w: w.update({"3.attention.proj.key_param_tokens": torch.ones(39, 32)}), CheckpointError,
         r"layer_03-model_00-model_states\.pt: attention\.proj\.key_param_tokens: it has shape \(39, 32\), not \(40, "
         r"32\)\. `proj_slot_num` decides"),
        (lambda w: w["5.norm.bias"].fill_(torch.nan), CheckpointError, r"layer_05-.*: norm\.bias holds NaN"),
        (lambda w: w.update({"5.norm.bias": torch.ones(32, dtype=torch.int64)}), CheckpointError, r"norm\.bias.*int64"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("2.")], CheckpointError,
         "transformer layer 2 is missing"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("3.")], ConfigError,
         "num_layers: checkpoint 1, configuration 2"),
        (lambda w: w.update({"6.final_linear.weight": torch.ones(ROWS, 32)}), ConfigError,
         "no_weight_tying: checkpoint True, configuration False"),
        (lambda w: w.clear() or w.update({"0.lm_head": torch.ones(2)}), CheckpointError,
         r"does not hold a model of GPT-NeoX.*but 0\.lm_head"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change: Change, error: type[UserError], match: str, tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    weights = neox_weights(settings, ROWS)
    change(weights)
    source = write_neox(tmp_path / "neox", weights, settings, "layers")
    fails(source, write_config(tmp_path, settings), tmp_path / "out", error, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ffn_slot_num": 47}, "ffn_slot_num: checkpoint 48, configuration 47"),
        ({"qkv_slot_num": 12, "hidden_size": 64}, "hidden_size: checkpoint 32, configuration 64; qkv_slot_num: check"),
        ({"final_norm": "layernorm_nonparam"}, "final_norm: checkpoint layernorm, configuration layernorm_nonparam"),
        ({"norm": "layernorm"}, "norm: checkpoint layernorm_nonparam, configuration layernorm"),
    ],
)
def test_a_wrong_configuration_is_told_by_its_keys(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "bin")
    fails(source, write_config(tmp_path, settings, **changes), tmp_path / "out", ConfigError, match)
    fails(source, write_config(tmp_path, MODELS["pythia"]), tmp_path / "out", ConfigError,
          "architecture: checkpoint tokenformer, configuration gpt_neox")  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_position_embeddings": 32}, "max_position_embeddings: checkpoint 16, configuration 32"),
        ({"architecture": "gpt_neox", "pos_emb": "rotary", "rotary_pct": 0.5}, "pos_emb: checkpoint learned, config"),
        (TOKENFORMER, "architecture: checkpoint gpt2 or gpt_neox, configuration tokenformer"),
        ({"use_bias_in_norms": False}, "use_bias_in_norms: checkpoint True, configuration False"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_of_gpt2_is_told_by_its_keys(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    settings = MODELS["gpt2"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "layers")
    scaled = {"scale_attn_by_inverse_layer_idx": changes.get("architecture", "gpt2") == "gpt2"}
    fails(source, write_config(tmp_path, settings, **(scaled | changes)), tmp_path / "out", ConfigError, match)


def test_positions_that_are_no_matrix_are_named(tmp_path: Path) -> None:
    settings = MODELS["gpt2"]
    weights = neox_weights(settings, ROWS) | {"0.position_embeddings.weight": torch.tensor(1.0)}
    source = write_neox(tmp_path / "neox", weights, settings, "layers")
    fails(source, write_config(tmp_path, settings), tmp_path / "out", CheckpointError, "is no matrix of positions")


def test_learned_positions_of_other_architectures_are_read(tmp_path: Path) -> None:
    """NeoX has them for every layer; a parallel residual makes it no GPT-2."""
    settings = MODELS["pythia"] | {"pos_emb": "learned"}
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    keys = {key: value for key, value in settings.items() if key != "architecture"}
    checkpoint = imported(source, write_config(tmp_path, keys), tmp_path / "out")
    assert checkpoint.config.model.architecture == "gpt_neox"
    got = read_weights(checkpoint)["embedding.position_embeddings.weight"]
    assert torch.equal(got, weights["0.position_embeddings.weight"])


def test_a_yaml_of_neox_s_own_learned_positions_makes_a_gpt2(tmp_path: Path) -> None:
    """It names no architecture; without the fused kernel its GeLU is the exact one."""
    ours = ("architecture", "scale_attn_by_inverse_layer_idx", "padded_vocab_size")
    settings = {key: value for key, value in MODELS["gpt2"].items() if key not in ours}
    settings |= {"attention_config": [[["global"], 3]], "gpt_j_residual": False, "opt_pos_emb_offset": 0}
    weights = neox_weights(MODELS["gpt2"], ROWS)
    source = write_neox(tmp_path / "neox", weights, settings, "layers", tensor=2)
    arguments = ["--input", source, "--write-config", tmp_path / "derived.yml", "--output_dir", tmp_path / "out"]
    assert import_neox.main(list(map(str, arguments))) == 0
    checkpoint = find_checkpoint(tmp_path / "out", None, "full")
    assert checkpoint is not None
    model = checkpoint.config.model
    assert (model.architecture, model.pos_emb, model.activation) == ("gpt2", "learned", "gelu")
    got, want = read_weights(checkpoint), our_weights(weights, 3)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_norms_without_biases_are_read(tmp_path: Path) -> None:
    settings = MODELS["gpt2"]
    weights = {name: w for name, w in neox_weights(settings, ROWS).items() if not name.endswith("norm.bias")}
    source = write_neox(tmp_path / "neox", weights, settings, "ranks")
    got = read_weights(imported(source, write_config(tmp_path, settings, use_bias_in_norms=False), tmp_path / "out"))
    want = our_weights(weights, settings["num_layers"])
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    settings = MODELS["pythia"]
    config = write_config(tmp_path, settings)
    out = tmp_path / "out"
    weights = neox_weights(settings, ROWS)
    fails(tmp_path / "nowhere", config, out, CheckpointError, r"nowhere does not exist\. Name a global_stepN folder")
    fails(tmp_path, config, out, CheckpointError, "holds no weights: neither layer_")
    step = write_neox(tmp_path / "layers", weights, settings, "layers", tensor=2)
    (step / "layer_03-model_01-model_states.pt").unlink()
    fails(step, config, out, CheckpointError, r"layer_03-model_01-model_states\.pt")
    step = write_neox(tmp_path / "ranks", weights, settings, "ranks", tensor=2)
    (step / "mp_rank_00_model_states.pt").unlink()
    fails(step, config, out, CheckpointError, r"mp_rank_00_model_states\.pt")
    torch.save(rank_file(None, settings), step / "mp_rank_00_model_states.pt")
    fails(step, config, out, CheckpointError, r"mp_rank_00.* holds no weights: a pipeline's are in layer_")
    (tmp_path / "layers" / "latest").write_text("../ranks/global_step5")
    fails(tmp_path / "layers", config, out, CheckpointError, r"latest names '\.\./ranks/global_step5', which is no")
    imported(write_neox(tmp_path / "bin", weights, settings, "bin"), config, out)
    with pytest.raises(CheckpointError, match="is a checkpoint of this trainer: give it as `load`"):
        imported(out, config, tmp_path / "again")
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        imported(tmp_path / "bin" / "global_step5", config, out)


def test_a_missing_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "bin")
    config = write_config(tmp_path, settings, tokenizer_type="HFTokenizer", vocab_file="nowhere.json")
    fails(source, config, tmp_path / "out", DataError, r"nowhere\.json: no such file")


def test_the_configuration_comes_from_the_checkpoint(tmp_path: Path) -> None:
    settings = {key: value for key, value in MODELS["pythia"].items() if key != "padded_vocab_size"}
    weights = neox_weights(settings, ROWS)
    source = write_neox(tmp_path / "neox", weights, settings | {"save": "/elsewhere"}, "layers", tensor=2)
    config = tmp_path / "derived.yml"
    arguments = ["--input", source, "--write-config", config, "--output_dir", tmp_path / "out"]
    assert import_neox.main(list(map(str, arguments))) == 0
    written = yaml.safe_load(config.read_text())
    assert written == settings | {"padded_vocab_size": ROWS}
    with pytest.raises(ConfigError, match="it exists"):
        import_neox.main(list(map(str, arguments)))


def test_shapes_alone_are_no_configuration(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "bin")
    arguments = ["--input", source, "--write-config", tmp_path / "new.yml", "--output_dir", tmp_path / "out"]
    known = (
        "architecture: tokenformer, num_layers: 2, hidden_size: 32, no_weight_tying: false, norm: layernorm_nonparam, "
        "final_norm: layernorm, qkv_slot_num: 24, proj_slot_num: 40, ffn_slot_num: 48, padded_vocab_size: 640"
    )
    with pytest.raises(ConfigError, match=f"Give --config_file, with what they do tell: {known}"):
        import_neox.main(list(map(str, arguments)))
    assert not (tmp_path / "new.yml").exists()


def test_the_command_takes_overrides_and_refuses_in_one_line(tmp_path: Path) -> None:
    settings = MODELS["tokenformer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "bin")
    config = write_config(tmp_path, settings, padded_vocab_size=512)
    named = {"--input": source, "--output_dir": tmp_path / "out", "--config_file": config}
    command = ["tools/ckpts/import_neox.py", *(str(word) for pair in named.items() for word in pair)]
    refused = run_command(command)
    assert refused.returncode == 2
    assert "padded_vocab_size: 640" in refused.stderr and "Traceback" not in refused.stderr
    finished = run_command([*command, "padded_vocab_size=640"])
    assert finished.returncode == 0, finished.stderr
    parameters = 640 * 32 + 2 * 2 * 32 * (3 * 24 + 40 + 48) + 2 * 32
    assert finished.stdout == f"{tmp_path}/out/global_step0: {source}, {parameters:,} parameters in float32\n"


def test_packed_rows_of_unknown_order_are_asked_for(tmp_path: Path) -> None:
    settings = MODELS["llama, newer"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "layers", tensor=2)
    with pytest.raises(ConfigError, match=r"Add --grouped-query-rows by-kind .* or by-head"):
        imported(source, write_config(tmp_path, settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_kv_heads": 4},
            r"query_key_value.weight has shape \(64, 32\).* 4 heads of queries and 4 of keys and values",
        ),
        ({"ffn_hidden_size": 96}, "ffn_hidden_size: checkpoint 88, configuration 96"),
        ({"use_bias_in_attn_linear": True}, "use_bias_in_attn_linear: checkpoint False, configuration True"),
        (
            {"architecture": "gpt_neox", "num_kv_heads": None, "ffn_hidden_size": None},
            "checkpoint llama, configuration gpt",
        ),
    ],
)
def test_another_gated_model_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    settings = MODELS["llama"]
    source = write_neox(tmp_path / "neox", neox_weights(settings, ROWS), settings, "layers")
    with pytest.raises((ConfigError, CheckpointError), match=said):
        imported(source, write_config(tmp_path, settings, **changes), tmp_path / "out")
