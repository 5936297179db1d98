"""Checkpoints to Hugging Face folders and back: logits, bits, and what goes wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.tensor_folder import open_folder
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import CheckpointError, ConfigError, DataError, UserError
from megatron.hf.export_checkpoint import Precision
from megatron.hf.import_folder import import_folder
from tests.helpers.bombs import Bomb
from tests.helpers.tiny_checkpoints import (
    MODELS,
    VOCAB,
    export,
    make_checkpoint,
    read_run,
    tokens,
    whole_model,
    write_yaml,
)
from tools.ckpts import convert_hf_to_neox, convert_neox_to_hf
from tools.ckpts.export_flags import PRECISIONS

FURTHER = [pytest.param(name, marks=pytest.mark.full) for name in ("gpt2", "llama")]


def test_precisions_of_exports_are_those_of_the_flag() -> None:
    assert get_args(Precision) == PRECISIONS


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    found = open_folder(folder)
    return found.read(found.files)


def assert_same_tensors(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("name", ["tokenformer", "pythia", *FURTHER])
@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_low_precision_stays_within_its_own_error(
    name: str, precision: str, unit: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(export(checkpoint, tmp_path / "hf", precision=precision))
    assert model.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.no_grad():
        want = whole_model(checkpoint.config)(tokens())
        got = model(tokens()).logits.float()
    assert 0 < (got - want).norm() / want.norm() < 8 * unit


def test_auto_keeps_the_format_of_training(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, MODELS["pythia"] | {"precision": "bfloat16"}))
    folder = export(checkpoint, tmp_path / "hf")
    assert {tensor.dtype for tensor in folder_tensors(folder).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_shards_and_index_are_those_of_transformers(tokenformer: Checkpoint, exported: Path, tmp_path: Path) -> None:
    folder = export(tokenformer, tmp_path / "hf", max_shard_bytes=1)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    want = folder_tensors(exported)
    assert_same_tensors(folder_tensors(folder), want)
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    with torch.no_grad():
        first, second = (AutoModelForCausalLM.from_pretrained(path)(tokens()).logits for path in (folder, exported))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["tokenformer", "pythia"])
def test_trimmed_vocabulary(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint = request.getfixturevalue(name)
    folder = export(checkpoint, tmp_path / "hf", trim_vocab=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == VOCAB.actual
    with torch.no_grad():
        want = whole_model(checkpoint.config)(tokens())[..., : VOCAB.actual]
        torch.testing.assert_close(model(tokens()).logits, want, rtol=0, atol=1e-5)

    run = checkpoint.config
    with pytest.raises(ConfigError, match=r"512 rows, the configured model 600.*mask_padded_vocab: true"):
        import_folder(folder, run, tmp_path / "imported")
    masked = run.model_copy(update={"model": run.model.model_copy(update={"mask_padded_vocab": True})})
    import_folder(folder, masked, tmp_path / "imported")
    imported = find_checkpoint(tmp_path / "imported", None, "full")
    assert imported is not None
    rows = read_weights(imported)["embedding.word_embeddings.weight"]
    assert rows.shape[0] == VOCAB.padded
    assert not rows[VOCAB.actual :].any()
    again = export(imported, tmp_path / "again", trim_vocab=True)
    assert_same_tensors(folder_tensors(again), folder_tensors(folder))


def test_padding_is_cut_off_where_the_softmax_masks_it(exported: Path, tmp_path: Path) -> None:
    fewer = {"make_vocab_size_divisible_by": 1, "mask_padded_vocab": True}
    run = read_run(write_yaml(tmp_path, MODELS["l2_norm_gelu"] | fewer))
    import_folder(exported, run, tmp_path / "imported")
    imported = find_checkpoint(tmp_path / "imported", None, "full")
    assert imported is not None
    got, want = read_weights(imported), whole_model(run).state_dict()
    assert torch.equal(
        got["embedding.word_embeddings.weight"], want["embedding.word_embeddings.weight"][: VOCAB.actual]
    )
    assert all(torch.equal(got[name], want[name]) for name in want if not name.startswith("embedding."))


def test_padding_rows_are_kept_and_never_generated(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.vocab_size == VOCAB.padded
    with torch.no_grad():
        model.lm_head.weight[VOCAB.actual :] = 10 * model.lm_head.weight[: VOCAB.padded - VOCAB.actual]
    generated = model.generate(tokens(), do_sample=True, max_new_tokens=20, pad_token_id=1)
    assert generated.max() < VOCAB.actual


def test_pythia_becomes_gpt_neox_with_its_activation(pythia: Checkpoint, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(export(pythia, tmp_path / "hf"))
    assert type(model) is GPTNeoXForCausalLM
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.use_parallel_residual
    assert not (tmp_path / "hf/modeling_tokenformer.py").exists()
    assert "embed_out.weight" in folder_tensors(tmp_path / "hf")


def test_tokenizer_of_the_folder_encodes_as_ours(exported: Path, tokenformer: Checkpoint) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(exported), build_tokenizer(tokenformer.config.data.tokenizer)
    text = "".join(map(chr, range(2, 0x180))) + "中🙂"
    assert theirs(text)["input_ids"] == ours.tokenize(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == ours.eod == 0
    batch = theirs(["abc", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_card_states_the_facts_of_the_run(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    facts = [
        "| step 7 |",
        "| 896 |",  # tokens seen: 56 samples of 16
        "| 39,744 |",  # parameters: 600 x 32 + 2 x 2 x 32 x (3 x 24 + 40 + 48) + 2 x 32
        "24 in q, k and v each, 40 in proj, 48 in the MLP",
        "600 rows, of which the last 88 are padding",
        "float32",
        "trust_remote_code=True",
    ]
    for fact in facts:
        assert fact in card, fact


@pytest.mark.parametrize(
    ("kind", "tokenizer"),
    [
        ("tokenformer", True),
        pytest.param("tokenformer", False, marks=pytest.mark.full),
        pytest.param("pythia", True, marks=pytest.mark.full),
        pytest.param("pythia", False, marks=pytest.mark.full),
        pytest.param("gpt2", True, marks=pytest.mark.full),
        pytest.param("llama", True, marks=pytest.mark.full),
    ],
)
def test_the_snippet_of_the_card_runs_without_a_terminal(
    kind: str, tokenizer: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In the folder's parent, as it stands: it asks nothing, and warns of nothing that concerns the folder."""
    if kind == "gpt2":  # It ends at the last of its learned positions.
        checkpoint = make_checkpoint(write_yaml(tmp_path, MODELS[kind] | {"max_position_embeddings": 64}))
    else:
        checkpoint = request.getfixturevalue(kind)
    folder = export(checkpoint, tmp_path / 'a "tiny" model', tokenizer=tokenizer)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    finished = subprocess.run(
        [sys.executable, "snippet.py"],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("['The parameter tokens" if tokenizer else "tensor([["), finished.stdout
    for unwanted in ("Do you wish", "custom code", "of type", "trust_remote_code"):
        assert unwanted not in finished.stdout + finished.stderr


ALONE = """
import sys, torch
sys.modules["megatron"] = None
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
classifier = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=3)
assert classifier(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
tokens = torch.load(sys.argv[3])
with torch.no_grad():
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    torch.save(model(tokens).logits, sys.argv[4])
"""


def test_folder_loads_alone_with_remote_code(exported: Path, tokenformer: Checkpoint, tmp_path: Path) -> None:
    """In a process that has none of our packages; what it saves again loads as well."""
    torch.save(tokens(), tmp_path / "tokens.pt")
    arguments = [exported, tmp_path / "saved", tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    finished = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        want = whole_model(tokenformer.config)(tokens())
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=0, atol=1e-5)


def fails_without_folder(function: Any, *arguments: Any, output: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        function(*arguments)
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("flip", "SHA-256 differs"),
        ("remove", "is missing"),
        ("nan", r"layers\.1\.mlp\.key_tokens holds NaN or infinity"),
        ("shape", r"layers\.1\.mlp\.key_tokens: tensor-parallel rank 0 has shape"),
        ("rename", "missing mlp.key_tokens; left over mlp.keys"),
    ],
)
def test_damaged_checkpoint_leaves_no_folder(damage: str, message: str, tmp_path: Path) -> None:
    config = write_yaml(tmp_path, MODELS["softmax"])
    checkpoint = make_checkpoint(config)
    file = checkpoint.path / "layer_02-model_00-model_states.pt"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-2000] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        layer = torch.load(file)
        tensor = layer.pop("mlp.key_tokens")
        tensor[3, 3] = torch.nan if damage == "nan" else tensor[3, 3]
        tensor = tensor[:-1].clone() if damage == "shape" else tensor
        torch.save(layer | {"mlp.keys" if damage == "rename" else "mlp.key_tokens": tensor}, file)
    arguments = [
        "--input_dir",
        str(checkpoint.path),
        "--config_file",
        str(config),
        "--output_dir",
        str(tmp_path / "hf"),
    ]
    if damage in ("flip", "remove"):
        fails_without_folder(
            convert_neox_to_hf.main, arguments, output=tmp_path / "hf", error=CheckpointError, match=message
        )
    else:
        fails_without_folder(
            export, checkpoint, tmp_path / "hf", output=tmp_path / "hf", error=CheckpointError, match=message
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ffn_slot_num": 47}, ConfigError, "'ffn': 48.*'ffn': 47"),
        ({"tokenizer_type": "HFTokenizer", "vocab_file": "nowhere.json"}, DataError, "nowhere.json: no such file"),
        ({"tokenizer_type": "HFTokenizer"}, ConfigError, "vocab_file: HFTokenizer needs a tokenizer.json"),
    ],
)
def test_wrong_configuration_leaves_no_folder(
    changes: dict[str, Any], error: type[UserError], message: str, tokenformer: Checkpoint, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path, MODELS["l2_norm_gelu"] | changes)
    output = tmp_path / "hf"
    arguments = ["--input_dir", str(tokenformer.path), "--config_file", str(config), "--output_dir", str(output)]
    fails_without_folder(convert_neox_to_hf.main, arguments, output=output, error=error, match=message)


def test_overflow_of_the_format_leaves_no_folder(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, MODELS["softmax"]))
    file = checkpoint.path / "layer_01-model_00-model_states.pt"
    layer = torch.load(file)
    layer["attention.proj.value_tokens"][2, 5] = 7e4
    torch.save(layer, file)
    output = tmp_path / "hf"
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.attention\.proj\.value_tokens .* too large for torch\.float16"
    ):
        export(checkpoint, output, precision="fp16")
    assert not output.exists()
    export(checkpoint, output, precision="bf16")


def test_wrong_arithmetic_is_found_by_the_check(
    tokenformer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final comparison sees what no name or shape tells: another scale of the scores."""
    from megatron.hf import export_checkpoint as exporting
    from megatron.hf.hf_architecture import HF_ARCHITECTURES

    right = HF_ARCHITECTURES["tokenformer"]

    def wrong_config(*arguments: Any) -> Any:
        config = right.to_config(*arguments)
        config.ffn_scale_base += 1
        return config

    wrong = replace(right, to_config=wrong_config)
    monkeypatch.setattr(exporting, "HF_ARCHITECTURES", {"tokenformer": wrong})
    output = tmp_path / "hf"
    fails_without_folder(export, tokenformer, output, output=output, error=CheckpointError, match="logits .* differ")


def test_existing_folder_is_not_touched(tokenformer: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export(tokenformer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def broken_copy(exported: Path, folder: Path, damage: str) -> None:
    """A copy of an exported folder with one thing wrong."""
    folder.mkdir()
    for path in exported.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    if damage == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])
        return
    (folder / "model.safetensors").unlink()
    name = "model.layers.0.mlp.value_tokens"
    if damage == "bomb":
        torch.save(weights | {name: Bomb(Path("exploded"))}, folder / "pytorch_model.bin")
        return
    if damage == "old bomb":
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump(Bomb(Path("exploded")), file)
        return
    if damage == "no weights":
        return
    tensor = weights.pop(name)
    if damage == "nan":
        weights[name] = tensor.clone().fill_(torch.nan)
    if damage == "left over":
        weights |= {name: tensor, f"{name}_2": tensor.clone()}
    if damage == "shape":
        weights[name] = tensor[1:].clone()
    if damage == "elsewhere":
        index = {"weight_map": dict.fromkeys(weights, "../outside.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "model.safetensors cannot be read"),
        ("bomb", "pytorch_model.bin holds more than tensors"),
        ("old bomb", "pytorch_model.bin"),
        ("no weights", "holds no weights"),
        ("nan", r"model\.layers\.0\.mlp\.value_tokens holds NaN"),
        ("missing", r"Missing: model\.layers\.0\.mlp\.value_tokens\. Left over: none"),
        ("left over", r"Missing: none\. Left over: model\.layers\.0\.mlp\.value_tokens_2"),
        ("shape", r"layers\.0\.mlp\.value_tokens has shape \(47, 32\)"),
        ("elsewhere", r"names '\.\./outside\.safetensors'"),
    ],
)
def test_damaged_folder_is_not_imported(
    damage: str, message: str, exported: Path, tokenformer: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken_copy(exported, tmp_path / "broken", damage)
    output = tmp_path / "imported"
    fails_without_folder(
        import_folder,
        tmp_path / "broken",
        tokenformer.config,
        output,
        output=output,
        error=CheckpointError,
        match=message,
    )
    assert not (tmp_path / "exploded").exists()


def test_bin_files_are_imported(exported: Path, tokenformer: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    torch.save(load_file(exported / "model.safetensors"), folder / "pytorch_model.bin")
    import_folder(folder, tokenformer.config, tmp_path / "imported")
    imported = find_checkpoint(tmp_path / "imported", None, "full")
    assert imported is not None
    assert_same_tensors(read_weights(imported), whole_model(tokenformer.config).state_dict())


@pytest.mark.parametrize("name", ["tokenformer", "pythia", "gpt2", "llama"])
def test_configuration_derived_from_a_folder(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    checkpoint = request.getfixturevalue(name)
    folder = export(checkpoint, tmp_path / "hf")
    derived = tmp_path / "derived.yml"
    arguments = ["--input_dir", str(folder), "--write-config", str(derived), "--output_dir", str(tmp_path / "imported")]
    assert convert_hf_to_neox.main(arguments) == 0
    ours, theirs = read_run(derived).model, checkpoint.config.model
    free = {
        "init_method",
        "output_layer_init_method",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "final_norm",
    }
    assert ours.model_dump(exclude=free) == theirs.model_dump(exclude=free)
    assert ours.padded_vocab_size == VOCAB.padded
    imported = find_checkpoint(tmp_path / "imported", None, "full")
    assert imported is not None
    assert imported.holds_weights_alone
    assert (imported.state.vocab_size, imported.state.padded_vocab_size) == (VOCAB.actual, VOCAB.padded)
    assert_same_tensors(read_weights(imported), whole_model(checkpoint.config).state_dict())


def test_wrong_configuration_is_not_imported(exported: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"ffn_slot_num": 49}, r"param_tokens\.ffn: folder 48, configuration 49"),
        ({"qkv_scale_base": 12}, r"param_tokens\.qkv_scale_base: folder 24, configuration 12"),
        ({"no_weight_tying": True}, "tie_embeddings: folder True, configuration False"),
        ({"make_vocab_size_divisible_by": 1}, "600 rows, the configured model 512"),
    ):
        run = read_run(write_yaml(tmp_path, MODELS["l2_norm_gelu"] | changes))
        output = tmp_path / "imported"
        fails_without_folder(import_folder, exported, run, output, output=output, error=ConfigError, match=message)
    pythia = read_run(write_yaml(tmp_path, MODELS["pythia"]))
    with pytest.raises(ConfigError, match="architecture: folder 'tokenformer', configuration 'gpt_neox'"):
        import_folder(exported, pythia, tmp_path / "imported")


def test_old_pythia_folders_are_read(pythia: Checkpoint, tmp_path: Path) -> None:
    """Masks and rotary frequencies that old versions saved are left out; gelu is kept as the folder says."""
    folder = export(pythia, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    weights["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    weights["gpt_neox.layers.1.attention.rotary_emb.inv_freq"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    old = {"hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000, "torch_dtype": "float16"}
    del config["rope_parameters"], config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | old))
    settings = yaml.safe_load((pythia.path.parents[1] / "run.yml").read_text()) | {"bias_gelu_fusion": False}
    run = read_run(write_yaml(tmp_path, settings))
    import_folder(folder, run, tmp_path / "imported")

    save_file(weights | {"lm_head.weight": weights["embed_out.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and embed_out\.weight are the same|embed_out\.weight and"
    ):
        import_folder(folder, run, tmp_path / "again")


def test_a_configuration_is_written_for_a_tokenizer_that_is_named(exported: Path, tmp_path: Path) -> None:
    """The folder needs none then; the words override other keys as before."""
    folder = shutil.copytree(exported, tmp_path / "folder", ignore=shutil.ignore_patterns("tokenizer*"))
    words = ["tokenizer_type=CharLevelTokenizer", "train_iters=7", "mask_padded_vocab=true"]
    arguments = [
        "--input_dir",
        folder,
        "--write-config",
        tmp_path / "new.yml",
        *words,
        "--output_dir",
        tmp_path / "run",
    ]
    assert convert_hf_to_neox.main([str(word) for word in arguments]) == 0
    written = yaml.safe_load((tmp_path / "new.yml").read_text())
    assert written["tokenizer_type"] == "CharLevelTokenizer"
    assert "vocab_file" not in written
    assert (tmp_path / "run" / "global_step0").is_dir()


def test_folders_that_cannot_be_described_leave_nothing(exported: Path, tmp_path: Path) -> None:
    def convert(folder: Path) -> None:
        names = {"--input_dir": folder, "--write-config": tmp_path / "new.yml", "--output_dir": tmp_path / "imported"}
        convert_hf_to_neox.main([str(part) for pair in names.items() for part in pair])

    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        convert(folder)
    (folder / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(
        CheckpointError, match="model_type 'opt' cannot be imported; known: gpt2, gpt_neox, llama, token"
    ):
        convert(folder)
    (folder / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}')
    (folder / "code.py").write_text("open('ran', 'w')")
    with pytest.raises(CheckpointError, match="model_type 'unheard_of' cannot be imported"):
        convert(folder)
    (folder / "config.json").write_text((exported / "config.json").read_text())
    with pytest.raises(DataError, match=r"no tokenizer\.json.*name one after the YAML"):
        convert(folder)
    (tmp_path / "new.yml").write_text("mine: 1\n")
    with pytest.raises(ConfigError, match="it exists"):
        convert(exported)
    assert (tmp_path / "new.yml").read_text() == "mine: 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new.yml"]
