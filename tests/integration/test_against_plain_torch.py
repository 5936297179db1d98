"""Training through the command line against a float64 loop that shares nothing with the engine but initial weights.

The loop has its own models, data order, loss, clipping, AdamW and learning rate, each written from the published
description. Its weights start from the run's checkpoint of step 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PYTHIA, SEQ_LENGTH, TOKENFORMER, records, train
from torch import Tensor

Weights = dict[str, Tensor]
STEPS, MICRO, ACCUMULATION = 30, 4, 2
BATCH = MICRO * ACCUMULATION
HEADS, WIDTH, LAYERS, ROTARY = 4, 32, 2, 2


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    normal = centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal if weight is None or bias is None else normal * weight + bias


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of the first ROTARY dimensions of [B, S, H, hd], pairs half a rotary width apart."""
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, ROTARY, 2, dtype=torch.float64) / ROTARY
    )
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second, rest = x[..., : ROTARY // 2], x[..., ROTARY // 2 : ROTARY], x[..., ROTARY:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [B, S, H, hd]."""
    scores = torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), v).flatten(2)


def tokenformer(weights: Weights, tokens: Tensor) -> Tensor:
    def pattention(x: Tensor, name: str) -> Tensor:
        scores = x @ weights[f"{name}.key_tokens"].T
        normal = scores / scores.pow(2).sum(-1, keepdim=True).sqrt() * math.sqrt(scores.shape[-1])
        return normal * 0.5 * (1 + torch.erf(normal / math.sqrt(2))) @ weights[f"{name}.value_tokens"]

    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(LAYERS):
        h = layer_norm(x)
        q, k, v = (
            pattention(h, f"layers.{i}.attention.{name}").unflatten(-1, (HEADS, -1))
            for name in ("query", "key", "value")
        )
        x = x + pattention(attend(q, k, v), f"layers.{i}.attention.proj")
        x = x + pattention(layer_norm(x), f"layers.{i}.mlp")
    x = layer_norm(x, weights["final_norm.weight"], weights["final_norm.bias"])
    return x @ weights["embedding.word_embeddings.weight"].T


def pythia(weights: Weights, tokens: Tensor) -> Tensor:
    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(LAYERS):
        own = {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}

        def linear(x: Tensor, name: str, own: Weights = own) -> Tensor:
            return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

        h = layer_norm(x, own["input_layernorm.weight"], own["input_layernorm.bias"])
        q, k, v = linear(h, "attention.query_key_value").unflatten(-1, (HEADS, 3 * WIDTH // HEADS)).chunk(3, -1)
        attention = linear(attend(q, k, v), "attention.dense")
        h = layer_norm(x, own["post_attention_layernorm.weight"], own["post_attention_layernorm.bias"])
        u = linear(h, "mlp.dense_h_to_4h")
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + attention + linear(u, "mlp.dense_4h_to_h")
    x = layer_norm(x, weights["final_norm.weight"], weights["final_norm.bias"])
    return x @ weights["head.weight"].T


def sample_order(prefix: Path) -> Iterator[Tensor]:
    """Samples of the training split in GPT-NeoX's order: documents shuffled, joined, cut, samples shuffled."""
    index = prefix.with_suffix(".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, np.int32, count, offset=34)
    ends = np.cumsum(sizes)
    stream = np.fromfile(prefix.with_suffix(".bin"), np.uint16)
    documents = [stream[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    shares = [90.0, 5.0, 5.0]
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / sum(shares) * count))
    excess = boundaries[-1] - count
    train_documents = np.arange(boundaries[1] - excess, dtype=np.int32)

    tokens = sum(len(documents[i]) for i in train_documents)
    epochs = 1
    while (epochs * tokens - 1) // SEQ_LENGTH < STEPS * BATCH:
        epochs += 1
    order = np.concatenate([train_documents] * epochs)
    rng = np.random.RandomState(7)
    rng.shuffle(order)
    joined = np.concatenate([documents[i] for i in order]).astype(np.int64)
    shuffled = np.arange((len(joined) - 1) // SEQ_LENGTH, dtype=np.uint32)
    rng.shuffle(shuffled)
    for i in shuffled.tolist():
        yield torch.from_numpy(joined[i * SEQ_LENGTH : (i + 1) * SEQ_LENGTH + 1])


def learning_rate(step: int) -> float:
    warmup = 0.1 * STEPS
    if step <= warmup:
        return 1e-3 * step / warmup
    return 1e-4 + (1e-3 - 1e-4) / 2 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def reference_run(
    forward: Callable[[Weights, Tensor], Tensor], weights: Weights, samples: Iterator[Tensor]
) -> Iterator[tuple[float, float]]:
    """Yield (loss, gradient norm before clipping) of each step, all in float64."""
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(STEPS):
        batch = torch.stack([next(samples) for _ in range(BATCH)])
        logits = forward(weights, batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
        clip = min(1.0, 1.0 / (norm + 1e-6))
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * clip
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.95 * second[name] + 0.05 * gradient**2
                if not ("norm" in name or name.endswith("bias")):
                    weight *= 1 - learning_rate(step) * 0.1
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                weight -= learning_rate(step) * m / (v.sqrt() + 1e-8)
        yield float(loss.detach()), norm


def initial_weights(run: Path, tied: bool) -> Weights:
    names = ["embedding", *(f"layers.{i}" for i in range(LAYERS)), "final_norm", *([] if tied else ["head"])]
    weights: Weights = {}
    for layer, name in enumerate(names):
        file = run / "global_step0" / f"layer_{layer:02d}-model_00-model_states.pt"
        weights |= {f"{name}.{local}": tensor for local, tensor in torch.load(file, weights_only=True).items()}
    return weights


@pytest.mark.parametrize(
    "base, forward, tied", [(TOKENFORMER, tokenformer, True), (PYTHIA, pythia, False)], ids=["tokenformer", "pythia"]
)
def test_losses_and_norms_follow_a_float64_loop(
    base: dict[str, Any],
    forward: Callable[[Weights, Tensor], Tensor],
    tied: bool,
    write_config: Callable[..., Path],
    dataset: Path,
) -> None:
    config = write_config(base, train_iters=STEPS, extra_save_iters=[0])
    train(config)
    run = config.with_suffix("")
    expected = list(reference_run(forward, initial_weights(run, tied), sample_order(dataset)))
    losses, norms = records(run, "train/lm_loss"), records(run, "train/grad_norm")
    assert list(losses) == list(range(1, STEPS + 1))
    assert list(losses.values()) == pytest.approx([loss for loss, _ in expected], abs=1e-6, rel=0)
    assert list(norms.values()) == pytest.approx([norm for _, norm in expected], abs=1e-5, rel=0)
    assert max(norms.values()) > 1.0, "clipping was never active"
    assert expected[-1][0] < expected[0][0] - 0.1, "nothing was learned"
