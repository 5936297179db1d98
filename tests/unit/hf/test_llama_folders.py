"""LLaMA's folders: as OpenLLaMA's are, with shared heads, in shards; what cannot be imported or exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.errors import CheckpointError, ConfigError
from megatron.hf.import_folder import import_folder
from tests.helpers.tiny_checkpoints import MODELS, export, make_checkpoint, read_run, tokens, whole_model, write_yaml
from tests.helpers.tokenizer_files import write_sentencepiece
from tools.ckpts import convert_hf_to_neox, convert_neox_to_hf

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def published_folder(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A folder as OpenLLaMA's are: one .bin, rotary frequencies among its tensors, and a tokenizer.model."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    folder.mkdir()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    torch.save(model.state_dict() | buffers, folder / "pytorch_model.bin")
    write_sentencepiece(folder / "tokenizer.model")
    return model


def imported(folder: Path, tmp_path: Path) -> Checkpoint:
    """The checkpoint that the command makes with a YAML of its own, tmp_path/new.yml."""
    arguments = {"--input_dir": folder, "--write-config": tmp_path / "new.yml", "--output_dir": tmp_path / "imported"}
    assert convert_hf_to_neox.main([str(part) for pair in arguments.items() for part in pair]) == 0
    checkpoint = find_checkpoint(tmp_path / "imported", None, "full")
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2, "rope_theta": 500000.0},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
    ids=["shared heads", "biases, tied"],
)
def test_a_published_folder_becomes_a_run_and_again_a_folder(changes: dict[str, Any], tmp_path: Path) -> None:
    """Its YAML is written, tokenizer and all; the new folder has the old one's tensors and encodes as it does."""
    theirs = published_folder(tmp_path / "llama", **changes)
    checkpoint = imported(tmp_path / "llama", tmp_path)
    written = yaml.safe_load((tmp_path / "new.yml").read_text())
    assert (written["architecture"], written["tokenizer_type"]) == ("llama", "SPMTokenizer")
    assert (written["ffn_hidden_size"], written["num_kv_heads"]) == (88, changes["num_key_value_heads"])
    again = tmp_path / "again"
    words = {
        "--architecture": "llama",
        "--input_dir": checkpoint.path,
        "--config_file": tmp_path / "new.yml",
        "--output_dir": again,
    }
    assert convert_neox_to_hf.main([str(part) for pair in words.items() for part in pair]) == 0
    want = {
        name: tensor
        for name, tensor in theirs.state_dict().items()
        if name != "lm_head.weight" or not theirs.config.tie_word_embeddings
    }
    got = load_file(again / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    tokenizer = AutoTokenizer.from_pretrained(again)
    assert tokenizer("The quick")["input_ids"][0] == tokenizer.bos_token_id == 1
    config = json.loads((again / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["rope_parameters"]["rope_theta"] == changes.get("rope_theta", 10000.0)


def test_a_llama_in_shards(llama: Checkpoint, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "hf", max_shard_bytes=60_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM
    assert (model.config.num_key_value_heads, model.config.intermediate_size, model.config.hidden_act) == (
        2,
        88,
        "silu",
    )
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, whole_model(llama.config)(tokens()), rtol=0, atol=1e-5)
    assert "A LLaMA (arXiv:2302.13971) language model." in (folder / "README.md").read_text()
    import_folder(folder, llama.config, tmp_path / "imported")
    back = find_checkpoint(tmp_path / "imported", None, "full")
    assert back is not None
    got, want = read_weights(back), whole_model(llama.config).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; the gate of our MLP is silu"),
        ({"head_dim": 16}, "head_dim: 16 x 4 heads are not hidden_size 32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type 'linear'; only 'default' is known here"),
    ],
)
def test_what_ours_cannot_be_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    published_folder(tmp_path / "llama", **changes)
    with pytest.raises(ConfigError, match=said):
        imported(tmp_path / "llama", tmp_path)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "layernorm"}, "norm: LlamaForCausalLM always has 'rmsnorm', and this model has 'layernorm'"),
        ({"final_norm": "layernorm"}, "final_norm: LlamaForCausalLM always has 'rmsnorm'"),
        ({"rotary_pct": 0.5}, "rotary_pct: LlamaForCausalLM always has 1.0, and this model has 0.5"),
        ({"gpt_j_residual": True}, "parallel_residual: LlamaForCausalLM always has False"),
    ],
)
def test_what_theirs_cannot_be_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(write_yaml(tmp_path, MODELS["llama"] | changes))
    with pytest.raises(ConfigError, match=said):
        export(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_another_number_of_shared_heads_is_another_model(llama: Checkpoint, tmp_path: Path) -> None:
    folder = export(llama, tmp_path / "hf")
    run = read_run(write_yaml(tmp_path, MODELS["llama"] | {"num_kv_heads": 1}))
    with pytest.raises(ConfigError, match="num_kv_heads: folder 2, configuration 1"):
        import_folder(folder, run, tmp_path / "imported")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))
    with pytest.raises(CheckpointError, match=r"self_attn\.k_proj\.weight has shape \(16, 32\).* \(8, 32\)"):
        import_folder(folder, run, tmp_path / "imported")


def test_the_flag_of_neox_does_not_make_another_architecture_of_it(llama: Checkpoint, tmp_path: Path) -> None:
    config = write_yaml(tmp_path, MODELS["llama"])
    words = [
        "--input_dir",
        llama.path,
        "--config_file",
        config,
        "--output_dir",
        tmp_path / "hf",
        "--architecture",
        "neox",
    ]
    with pytest.raises(ConfigError, match=r"--architecture neox: .* holds a llama. Leave the flag out"):
        convert_neox_to_hf.main([str(word) for word in words])
