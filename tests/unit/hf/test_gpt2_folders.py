"""GPT-2's folders: as published, without biases, in shards; what they cannot be, and what cannot be exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.import_folder import import_folder
from tests.helpers.tiny_checkpoints import MODELS, export, make_checkpoint, read_run, tokens, whole_model, write_yaml
from tests.helpers.tokenizer_files import write_tokenizers
from tools.ckpts import convert_hf_to_neox

NO_BIASES = {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False, "use_bias_in_norms": False}


def imported_weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = find_checkpoint(folder, None, "full")
    assert checkpoint is not None
    return dict(read_weights(checkpoint))


def published_folder(folder: Path, vocab: int, **changes: Any) -> GPT2LMHeadModel:
    """A folder as GPT-2's own are: GPT2Model's names, causal masks among the tensors, GPT-2's two tokenizer files."""
    torch.manual_seed(3)
    sizes = {"vocab_size": vocab, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    named = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    named["h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    named["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(named, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("scaled", [True, False])
def test_a_published_folder_becomes_a_run(scaled: bool, tmp_path: Path) -> None:
    """Its YAML is written, tokenizer and all; the checkpoint computes what transformers does."""
    folder = tmp_path / "gpt2"
    rows = len(json.loads((write_tokenizers(tmp_path) / "vocab.json").read_text()))
    theirs = published_folder(folder, rows, scale_attn_by_inverse_layer_idx=scaled)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).rename(folder / name)
    arguments = {"--input_dir": folder, "--write-config": tmp_path / "new.yml", "--output_dir": tmp_path / "imported"}
    assert convert_hf_to_neox.main([str(part) for pair in arguments.items() for part in pair]) == 0
    written = yaml.safe_load((tmp_path / "new.yml").read_text())
    assert written["architecture"] == "gpt2"
    assert written["tokenizer_type"] == "GPT2BPETokenizer"
    assert written["max_position_embeddings"] == 16
    assert written["scale_attn_by_inverse_layer_idx"] is scaled
    checkpoint = find_checkpoint(tmp_path / "imported", None, "full")
    assert checkpoint is not None
    again = export(checkpoint, tmp_path / "again")
    ids = tokens() % rows
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(again)(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=0)
    text = "a low lower newest"
    assert (
        AutoTokenizer.from_pretrained(again)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    )


def test_gpt2_becomes_gpt2_in_shards(gpt2: Checkpoint, tmp_path: Path) -> None:
    folder = export(gpt2, tmp_path / "hf", max_shard_bytes=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is GPT2LMHeadModel
    assert model.config.activation_function == "gelu_new"
    assert model.config.scale_attn_by_inverse_layer_idx
    assert not model.config.is_remote_code()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, whole_model(gpt2.config)(tokens()), rtol=0, atol=1e-5)
    assert "A GPT-2 (Radford et al. 2019) language model." in (folder / "README.md").read_text()


def test_biases_left_out_are_zeros_there_and_are_left_out_again(tmp_path: Path) -> None:
    config = write_yaml(tmp_path, MODELS["gpt2"] | NO_BIASES)
    checkpoint = make_checkpoint(config)
    folder = export(checkpoint, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    biases = [name for name in weights if name.endswith(".bias")]
    assert len(biases) == 3 * 6 + 1
    assert not any(weights[name].any() for name in biases)
    derived = tmp_path / "derived.yml"
    arguments = ["--input_dir", folder, "--write-config", derived, "--output_dir", tmp_path / "imported"]
    assert convert_hf_to_neox.main([str(part) for part in arguments]) == 0
    assert {key: yaml.safe_load(derived.read_text())[key] for key in NO_BIASES} == NO_BIASES
    want = whole_model(checkpoint.config).state_dict()
    got = imported_weights(tmp_path / "imported")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)

    weights["transformer.h.1.mlp.c_fc.bias"][3] = 1e-3
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias is not zero, and use_bias_in_mlp: false leaves"):
        import_folder(folder, read_run(config), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_copy_of_the_tied_embedding_is_read_past(gpt2: Checkpoint, tmp_path: Path) -> None:
    folder = export(gpt2, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["transformer.wte.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    import_folder(folder, gpt2.config, tmp_path / "imported")
    assert torch.equal(imported_weights(tmp_path / "imported")["embedding.word_embeddings.weight"], embedding)
    save_file(weights | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        import_folder(folder, gpt2.config, tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 32}, "max_position_embeddings: folder 16, configuration 32"),
        ({"seq_length": 8, "max_position_embeddings": 8}, "max_position_embeddings: folder 16, configuration 8"),
        ({"scale_attn_by_inverse_layer_idx": False}, "scale_attn_by_inverse_layer_idx: folder True, configuration"),
        ({"activation": "gelu"}, "activation: folder 'gelu_tanh', configuration 'gelu'"),
        ({"architecture": "gpt_neox", "scale_attn_by_inverse_layer_idx": False}, "architecture: folder 'gpt2', conf"),
    ],
)
def test_another_model_is_not_imported(changes: dict[str, Any], message: str, gpt2: Checkpoint, tmp_path: Path) -> None:
    folder = export(gpt2, tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        import_folder(folder, read_run(write_yaml(tmp_path, MODELS["gpt2"] | changes)), tmp_path / "imported")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_inner": 64}, "n_inner: 64; our MLP has 4 x n_embd = 128"),
        ({"activation_function": "relu"}, "activation_function: 'relu'; known: gelu, gelu_new"),
        ({"scale_attn_weights": False}, "scale_attn_weights: false"),
        ({"add_cross_attention": True}, "add_cross_attention: true"),
        ({"resid_pdrop": 0.5}, "embd_pdrop: 0.0, and resid_pdrop 0.5: our hidden_dropout is both"),
    ],
)
def test_what_our_gpt2_cannot_be(changes: dict[str, Any], message: str, gpt2: Checkpoint, tmp_path: Path) -> None:
    folder = export(gpt2, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        import_folder(folder, gpt2.config, tmp_path / "imported")


@pytest.mark.parametrize("field", ["pad_token_id", "n_embd", "activation_function"])
def test_fields_of_a_foreign_type_are_named(field: str, gpt2: Checkpoint, tmp_path: Path) -> None:
    folder = export(gpt2, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: [1.5]}))
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: .*{field}"):
        import_folder(folder, gpt2.config, tmp_path / "imported")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MODELS["gpt2"] | {"norm": "rmsnorm"}, "norm: GPT2LMHeadModel always has 'layernorm'"),
        (MODELS["gpt2"] | {"final_norm": "rmsnorm"}, "final_norm: GPT2LMHeadModel always has 'layernorm'"),
        (MODELS["pythia"] | {"pos_emb": "learned"}, "pos_emb: GPTNeoXForCausalLM always has 'rotary'"),
        (MODELS["l2_norm_gelu"] | {"pos_emb": "learned"}, "pos_emb: this model has learned positions, TokenFormer"),
    ],
)
def test_what_has_no_export(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, settings))
    with pytest.raises(ConfigError, match=message):
        export(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
