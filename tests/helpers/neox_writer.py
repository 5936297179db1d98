"""Writes checkpoints as GPT-NeoX and the TokenFormer release do, from whole weights; shares nothing with the importer.

Weights are named as in the release's plain module, without its prefix: `2.attention.dense.weight`.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from tests.helpers import plain_torch
from tests.helpers.configs import GPT2, LLAMA, PYTHIA, TOKENFORMER
from tools.ckpts import import_neox

Weights = dict[str, Tensor]
Form = Literal["layers", "ranks", "bin", "bin of a pipeline"]

COLUMN_PARALLEL = ("query_key_value.weight", "query_key_value.bias", "h_to_4h.weight", "h_to_4h.bias", "linear1.weight",
                   "linear1.bias", "w1.weight", "w3.weight", "word_embeddings.weight")  # fmt: skip
ROW_PARALLEL = ("attention.dense.weight", "4h_to_h.weight", "linear2.weight", "w2.weight")
ROW_PARALLEL_BIAS = ("attention.dense.bias", "4h_to_h.bias", "linear2.bias")


def neox_weights(settings: dict[str, Any], rows: int) -> Weights:
    """Random weights of the model that NeoX builds from these keys, with `rows` vocabulary rows."""
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int, around: float = 0.0) -> Tensor:
        # Few bits, so that parts of a sum add up exactly.
        return around + (0.2 * torch.randn(shape, generator=generator) * 2**10).round() / 2**10

    width, layers = settings["hidden_size"], settings["num_layers"]
    weights = {"0.word_embeddings.weight": some(rows, width)}
    if settings["pos_emb"] == "learned":
        weights["0.position_embeddings.weight"] = some(settings["max_position_embeddings"], width)
    for layer in range(2, layers + 2):
        block = {}
        if settings["architecture"] == "tokenformer":
            for name, key in (("query", "qkv"), ("key", "qkv"), ("value", "qkv"), ("proj", "proj")):
                for kind in ("key", "value"):
                    block[f"attention.{name}.{kind}_param_tokens"] = some(settings[f"{key}_slot_num"], width)
            for kind in ("key", "value"):
                block[f"mlp.{kind}_param_tokens"] = some(settings["ffn_slot_num"], width)
        elif settings["architecture"] == "llama":
            block = _llama_block(settings, some)
        else:
            block = _linear_block(width, some)
        weights |= {f"{layer}.{name}": tensor for name, tensor in block.items()}
    if settings["architecture"] == "llama":
        weights[f"{layers + 3}.norm.scale"] = some(width, around=1.0)
    else:
        weights |= {f"{layers + 3}.norm.weight": some(width, around=1.0), f"{layers + 3}.norm.bias": some(width)}
    if settings.get("no_weight_tying"):
        weights[f"{layers + 4}.final_linear.weight"] = some(rows, width)
    return weights


def _linear_block(width: int, some: Callable[..., Tensor]) -> Weights:
    """A layer of NeoX's own."""
    block: Weights = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        block |= {f"{norm}.weight": some(width, around=1.0), f"{norm}.bias": some(width)}
    for name, outputs, inputs in (
        ("attention.query_key_value", 3 * width, width),
        ("attention.dense", width, width),
        ("mlp.dense_h_to_4h", 4 * width, width),
        ("mlp.dense_4h_to_h", width, 4 * width),
    ):
        block |= {f"{name}.weight": some(outputs, inputs), f"{name}.bias": some(outputs)}
    return block


def _llama_block(settings: dict[str, Any], some: Callable[..., Tensor]) -> Weights:
    """A layer of NeoX's gated models: packed by its order of rows, with the MLP of its older or newer version."""
    width, inside = settings["hidden_size"], settings["ffn_hidden_size"]
    shared = width // settings["num_attention_heads"] * settings["num_kv_heads"]
    block = {f"{norm}.scale": some(width, around=1.0) for norm in ("input_layernorm", "post_attention_layernorm")}
    block |= {
        "attention.query_key_value.weight": some(width + 2 * shared, width),
        "attention.dense.weight": some(width, width),
    }
    if settings.get("newer_mlp"):
        return block | {"mlp.linear1.weight": some(2 * inside, width), "mlp.linear2.weight": some(width, inside)}
    return block | {
        "mlp.w1.weight": some(inside, width),
        "mlp.w2.weight": some(width, inside),
        "mlp.w3.weight": some(inside, width),
    }


def _packed(name: str, whole: Tensor, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """The parts that every rank has a share of, one after the other; none for a parameter that is not packed so."""
    if name.endswith("query_key_value.weight") and settings.get("rows") == "by-kind":
        return whole.split(by_kind(settings))
    return whole.chunk(2) if name.endswith("linear1.weight") and settings.get("newer_mlp") else ()


def by_kind(settings: dict[str, Any]) -> list[int]:
    """Rows of queries, keys and values."""
    head_size = settings["hidden_size"] // settings["num_attention_heads"]
    return [head_size * settings[f"num_{heads}"] for heads in ("attention_heads", "kv_heads", "kv_heads")]


def rank_part(name: str, whole: Tensor, rank: int, size: int, settings: dict[str, Any]) -> Tensor:
    """What tensor-parallel rank `rank` of `size` holds of a parameter."""
    packed = _packed(name, whole, settings)
    if packed:
        return torch.cat([part.chunk(size)[rank] for part in packed])
    if name.endswith("final_linear.weight"):
        return whole.chunk(size, dim=1 if settings.get("output_layer_parallelism") == "row" else 0)[rank].clone()
    if name.endswith(COLUMN_PARALLEL) or (name.endswith("param_tokens") and settings.get("split_tokens")):
        return whole.chunk(size, dim=0)[rank].clone()
    if name.endswith(ROW_PARALLEL):
        return whole.chunk(size, dim=1)[rank].clone()
    if name.endswith(ROW_PARALLEL_BIAS) and settings.get("gpt_j_residual") and size > 1:
        # Each rank has learned its own, and the model adds them all.
        share = (whole * 2**8).round() / 2**10
        return whole - share * (size - 1) if rank == 0 else share
    return whole.clone()


def write_neox(
    folder: Path, weights: Weights, settings: dict[str, Any], form: Form, *, tensor: int = 1, pipe: int = 1
) -> Path:
    """A run's folder with global_step5; the path of what a user would give. `settings` are its YAML's."""
    step = folder / "global_step5"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step5")
    if form in ("bin", "bin of a pipeline"):
        file = step / "pytorch_model.bin"
        torch.save({_whole_name(name, form, settings): tensor for name, tensor in weights.items()}, file)
        return file
    (step / "configs").mkdir()
    (step / "configs" / "model.yml").write_text(yaml.safe_dump(settings))
    for rank in range(tensor):
        parts = {name: rank_part(name, whole, rank, tensor, settings) for name, whole in weights.items()}
        if form == "ranks":
            module = {f"sequential.{name}": part for name, part in parts.items()}
            torch.save(rank_file(module, settings), step / f"mp_rank_{rank:02d}_model_states.pt")
            continue
        for layer in sorted({int(name.split(".")[0]) for name in parts}):
            own = {name.partition(".")[2]: part for name, part in parts.items() if name.startswith(f"{layer}.")}
            if any(name.startswith("attention.query_key_value") for name in own):
                own["attention.rotary_emb.inv_freq"] = torch.ones(2)
            torch.save(OrderedDict(own), step / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    if form == "layers":
        for rank in range(tensor * pipe):
            torch.save(rank_file(None, settings), step / f"mp_rank_{rank:02d}_model_states.pt")
    return step


def rank_file(module: Weights | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's engine saves for a rank of NeoX, apart from ZeRO's optimizer files."""
    arguments = {key: settings[key] for key in ("num_layers", "hidden_size", "num_attention_heads", "tokenizer_type")}
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": {"loss_scaler": DynamicLossScaler(2**12, 2, 1000, 1, 2, False)},
        "param_shapes": [OrderedDict({name: tensor.shape for name, tensor in (module or {}).items()})],
        "lr_scheduler": {"start_lr": 6e-4, "num_iters": 5, "decay_style": "cosine"},
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 5,
        "ds_config": {"train_micro_batch_size_per_gpu": 4},
        "ds_version": "0.19.8",
        "iteration": 5,
        "args": arguments,
        "parsed": argparse.Namespace(**arguments),
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }


def _whole_name(name: str, form: Form, settings: dict[str, Any]) -> str:
    if form == "bin":
        return f"sequential.{name}"
    tied = name.startswith("0.") and not settings.get("no_weight_tying")
    return f"tied_modules.embed.{name.removeprefix('0.')}" if tied else name


def our_llama(weights: Weights, settings: dict[str, Any]) -> Weights:
    """NeoX's gated models under our names, row by row from where NeoX reads each."""
    heads, shared = settings["num_attention_heads"], settings["num_kv_heads"]
    size = settings["hidden_size"] // heads
    share = size * shared // heads
    names = {"scale": "weight", "mlp.w1": "mlp.gate", "mlp.w2": "mlp.down", "mlp.w3": "mlp.up", "linear2": "down"}
    renamed = {}
    for name, tensor in our_weights(weights, settings["num_layers"]).items():
        prefix = name.partition("attention.")[0] if "query_key_value" in name else name.partition("linear1")[0]
        if "query_key_value" in name and settings.get("rows") == "by-kind":
            parts = tensor.split(by_kind(settings))
            renamed |= {f"{prefix}attention.{k}.weight": part for k, part in zip(KINDS, parts, strict=True)}
        elif "query_key_value" in name:
            step = size + 2 * share
            starts = {"query": (0, size), "key": (size, share), "value": (size + share, share)}
            for kind, (start, count) in starts.items():
                rows = [head * step + start + row for head in range(heads) for row in range(count)]
                renamed[f"{prefix}attention.{kind}.weight"] = tensor[rows]
        elif "linear1" in name:
            renamed |= {
                f"{prefix}{half}.weight": part for half, part in zip(("up", "gate"), tensor.chunk(2), strict=True)
            }
        else:
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            renamed[name] = tensor
    return renamed


KINDS = ("query", "key", "value")


def our_weights(weights: Weights, num_layers: int) -> Weights:
    """The same under the names that this project gives them."""
    renamed = {}
    for name, tensor in weights.items():
        number, _, local = name.partition(".")
        layer = int(number)
        if layer == 0:
            ours = f"embedding.{local}"
        elif layer == num_layers + 3:
            ours = local.replace("norm.", "final_norm.")
        elif layer == num_layers + 4:
            ours = local.replace("final_linear.", "head.")
        else:
            ours = f"layers.{layer - 2}.{local}".replace("_param_tokens", "_tokens")
        renamed[ours] = tensor
    return renamed


ROWS = 640
TOKENS = 512
"""CharLevelTokenizer's ids; the other rows are padding."""

MODELS: dict[str, dict[str, Any]] = {
    "tokenformer": TOKENFORMER | {"padded_vocab_size": ROWS},
    "tokenformer, split": TOKENFORMER | {"padded_vocab_size": ROWS, "split_tokens": True},
    "pythia": PYTHIA | {"padded_vocab_size": ROWS},
    "gpt2": GPT2 | {"padded_vocab_size": ROWS},
    "sequential residual": PYTHIA | {"padded_vocab_size": ROWS, "gpt_j_residual": False},
    "llama": LLAMA | {"padded_vocab_size": ROWS},
    "llama, as many heads": LLAMA | {"padded_vocab_size": ROWS, "num_kv_heads": 4, "newer_mlp": True},
    "llama, newer": LLAMA | {"padded_vocab_size": ROWS, "newer_mlp": True, "rows": "by-kind"},
    "llama, in between": LLAMA | {"padded_vocab_size": ROWS, "newer_mlp": True, "rows": "by-head"},
}
OF_THE_WRITER = ("split_tokens", "newer_mlp", "rows")


def write_config(folder: Path, settings: dict[str, Any], **changes: Any) -> Path:
    path = folder / "config.yml"
    keys = {key: value for key, value in settings.items() if key not in OF_THE_WRITER}
    path.write_text(yaml.safe_dump(keys | {"save": str(folder / "run")} | changes))
    return path


def imported(source: Path, config: Path, output: Path, *words: str) -> Checkpoint:
    """The checkpoint that the command makes."""
    arguments = ["--input", str(source), "--config_file", str(config), "--output_dir", str(output)]
    assert import_neox.main([*arguments, *words]) == 0
    checkpoint = find_checkpoint(output, None, "full")
    assert checkpoint is not None
    assert (output / "latest").read_text().strip() == "global_step0"
    return checkpoint


def tokens() -> Tensor:
    return torch.randint(TOKENS, (3, 16), generator=torch.Generator().manual_seed(4))


def independent_logits(weights: Weights, settings: dict[str, Any]) -> Tensor:
    """Of the whole weights, by implementations that are not ours or not the trainer's."""
    plain = {"tokenformer": plain_torch.tokenformer, "gpt2": plain_torch.gpt2}.get(settings["architecture"])
    if plain is not None:
        doubles = {name: tensor.double() for name, tensor in our_weights(weights, settings["num_layers"]).items()}
        return plain(doubles, tokens(), settings)
    if settings["architecture"] == "llama":
        return plain_torch.llama({n: t.double() for n, t in our_llama(weights, settings).items()}, tokens(), settings)
    return transformers_logits(weights, settings)


def transformers_logits(weights: Weights, settings: dict[str, Any]) -> Tensor:
    layers, width = settings["num_layers"], settings["hidden_size"]
    config = GPTNeoXConfig(
        vocab_size=len(weights["0.word_embeddings.weight"]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=settings["num_attention_heads"],
        intermediate_size=4 * width,
        hidden_act="gelu_pytorch_tanh",
        rotary_pct=settings["rotary_pct"],
        max_position_embeddings=16,
        use_parallel_residual=settings["gpt_j_residual"],
        tie_word_embeddings=not settings["no_weight_tying"],
    )
    model = GPTNeoXForCausalLM(config).double().eval()
    renamed = {}
    for name, tensor in weights.items():
        number, _, local = name.partition(".")
        named = {0: "gpt_neox.embed_in.weight", layers + 4: "lm_head.weight"}.get(int(number))
        if int(number) == layers + 3:
            named = local.replace("norm.", "gpt_neox.final_layer_norm.")
        renamed[named or f"gpt_neox.layers.{int(number) - 2}.{local}"] = tensor.double()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == renamed.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(renamed[name])
        logits: Tensor = model(tokens()).logits
    return logits
