"""Training in plain torch and float64, sharing nothing with the engine but initial weights.

Models, data order, loss, clipping, AdamW and learning rate are each written from the published description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
END_OF_DOCUMENT = 0


@dataclass(frozen=True)
class PlainRun:
    """The settings of a run, from the keys of its YAML, without accumulation or ranks."""

    settings: dict[str, Any]
    batch: int
    """Samples per step."""
    steps: int

    def follow(self, weights: Weights, prefix: Path) -> Iterator[tuple[float, float]]:
        """Yield (loss, gradient norm before clipping) of each step on the dataset at `prefix`."""
        samples = sample_order(prefix, self.settings, self.steps * self.batch)
        weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
        state = State(weights)
        forward = {"tokenformer": tokenformer, "gpt_neox": pythia, "gpt2": gpt2, "llama": llama}[
            self.settings["architecture"]
        ]
        limit = self.settings["gradient_clipping"]
        for step in range(self.steps):
            tokens = torch.stack([next(samples) for _ in range(self.batch)])
            logits = forward(weights, tokens[:, :-1], self.settings)
            counted = tokens[:, :-1] != END_OF_DOCUMENT if self.settings.get("eod_mask_loss") else ...
            loss = F.cross_entropy(logits[counted].flatten(0, -2), tokens[:, 1:][counted].flatten())
            gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
            norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
            clip = min(1.0, limit / (norm + 1e-6))
            with torch.no_grad():
                for name, weight in weights.items():
                    self.update(name, weight, gradients[name] * clip, state, step)
            yield float(loss.detach()), norm

    def update(self, name: str, weight: Tensor, gradient: Tensor, state: State, step: int) -> None:
        """One step of a weight: AdamW's, or Muon's where that is chosen and the weight is a matrix of a layer."""
        optimizer, rate = self.settings["optimizer"], self.learning_rate(step)
        is_vector = "norm" in name or name.endswith("bias")
        is_hidden = name.startswith("layers.") and not is_vector
        if optimizer["type"] == "Muon" and not is_hidden:
            rate *= optimizer["params"]["adam_lr"] / optimizer["params"]["lr"]
        if not is_vector:
            weight *= 1 - rate * self.settings["weight_decay"]
        if optimizer["type"] == "Muon" and is_hidden:
            state.first[name] = 0.95 * state.first[name] + 0.05 * gradient
            newest = 0.05 * gradient + 0.95 * state.first[name]
            weight -= rate * 0.2 * math.sqrt(max(weight.shape)) * nearly_orthogonal(newest)
            return
        state.first[name] = 0.9 * state.first[name] + 0.1 * gradient
        state.second[name] = 0.95 * state.second[name] + 0.05 * gradient**2
        m, v = state.first[name] / (1 - 0.9 ** (step + 1)), state.second[name] / (1 - 0.95 ** (step + 1))
        weight -= rate * m / (v.sqrt() + 1e-8)

    def learning_rate(self, step: int) -> float:
        peak, lowest = self.settings["optimizer"]["params"]["lr"], self.settings["min_lr"]
        end = self.settings["lr_decay_iters"]
        warmup = self.settings["warmup"] * end
        if step <= warmup:
            return peak * step / warmup
        return lowest + (peak - lowest) / 2 * (1 + math.cos(math.pi * (step - warmup) / (end - warmup)))


class State:
    """Running averages of gradients and of their squares."""

    def __init__(self, weights: Weights) -> None:
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}


def nearly_orthogonal(matrix: Tensor) -> Tensor:
    """Muon's five Newton-Schulz steps as what they do to singular values: s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    normal = centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return normal if weight is None or bias is None else normal * weight + bias


def rotate(x: Tensor, width: int) -> Tensor:
    """Rotary embedding of the first `width` dimensions of [B, S, H, hd], pairs half a rotary width apart."""
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]) -> Tensor:
    """Causal attention over [B, S, H, hd], its positions rotary."""
    width = int(q.shape[-1] * settings["rotary_pct"])
    return weigh(rotate(q, width), rotate(k, width), v, math.sqrt(q.shape[-1]))


def weigh(q: Tensor, k: Tensor, v: Tensor, divisor: float) -> Tensor:
    """Causal attention over [B, S, H, hd] by scores that are divided."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / divisor
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), v).flatten(2)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


THETAS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "l2_norm_gelu": lambda scores, scale: gelu(unit(scores) * math.sqrt(scale)),
    "gelu_l2_norm": lambda scores, scale: unit(gelu(scores)) * math.sqrt(scale),
    "softmax": lambda scores, scale: scores.exp() / scores.exp().sum(-1, keepdim=True) * scale,
}
"""Normalizations of a row's scores, as published."""


def tokenformer(weights: Weights, tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    def pattention(x: Tensor, name: str) -> Tensor:
        scores = x @ weights[f"{name}.key_tokens"].T
        # A grown layer keeps the scale of the tokens that it had first.
        scale = settings.get("scales", {}).get(name.rsplit(".", maxsplit=1)[-1], scores.shape[-1])
        return theta(scores, scale) @ weights[f"{name}.value_tokens"]

    theta = THETAS[settings.get("norm_activation_type", "l2_norm_gelu")]
    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(settings["num_layers"]):
        h = layer_norm(x)
        q, k, v = (
            pattention(h, f"layers.{i}.attention.{name}").unflatten(-1, (settings["num_attention_heads"], -1))
            for name in ("query", "key", "value")
        )
        x = x + pattention(attend(q, k, v, settings), f"layers.{i}.attention.proj")
        x = x + pattention(layer_norm(x), f"layers.{i}.mlp")
    return logits(weights, x)


def pythia(weights: Weights, tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(settings["num_layers"]):
        own = of_layer(weights, i)
        q, k, v = heads_of(x, own, settings)
        attention = linear(attend(q, k, v, settings), "attention.dense", own)
        x = x + attention + mlp(x, own)
    return logits(weights, x)


def gpt2(weights: Weights, tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    """Positions are added once, sublayers are sequential, and the scores of layer i are divided by i + 1 if asked."""
    positions = weights["embedding.position_embeddings.weight"]
    x = weights["embedding.word_embeddings.weight"][tokens] + positions[: tokens.shape[1]]
    for i in range(settings["num_layers"]):
        own = of_layer(weights, i)
        q, k, v = heads_of(x, own, settings)
        depth = i + 1 if settings["scale_attn_by_inverse_layer_idx"] else 1
        x = x + linear(weigh(q, k, v, depth * math.sqrt(q.shape[-1])), "attention.dense", own)
        x = x + mlp(x, own)
    return logits(weights, x)


def of_layer(weights: Weights, i: int) -> Weights:
    return {name.removeprefix(f"layers.{i}."): w for name, w in weights.items() if name.startswith(f"layers.{i}.")}


def linear(x: Tensor, name: str, own: Weights) -> Tensor:
    return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]


def heads_of(x: Tensor, own: Weights, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """q, k and v [B, S, H, hd] of the layer's input."""
    heads = settings["num_attention_heads"]
    h = layer_norm(x, own["input_layernorm.weight"], own["input_layernorm.bias"])
    return linear(h, "attention.query_key_value", own).unflatten(-1, (heads, 3 * x.shape[-1] // heads)).chunk(3, -1)


def mlp(x: Tensor, own: Weights) -> Tensor:
    h = layer_norm(x, own["post_attention_layernorm.weight"], own["post_attention_layernorm.bias"])
    u = linear(h, "mlp.dense_h_to_4h", own)
    u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return linear(u, "mlp.dense_4h_to_h", own)


def llama(weights: Weights, tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + settings["rms_norm_epsilon"]).sqrt() * weights[f"{name}.weight"]

    heads = settings["num_attention_heads"]
    sharing = heads // settings["num_kv_heads"]
    x = weights["embedding.word_embeddings.weight"][tokens]
    for i in range(settings["num_layers"]):
        h = rms_norm(x, f"layers.{i}.input_layernorm")
        q, k, v = (h @ weights[f"layers.{i}.attention.{name}.weight"].T for name in ("query", "key", "value"))
        q, k, v = (y.unflatten(-1, (-1, x.shape[-1] // heads)) for y in (q, k, v))
        k, v = (torch.stack([y[:, :, head // sharing] for head in range(heads)], dim=2) for y in (k, v))
        x = x + attend(q, k, v, settings) @ weights[f"layers.{i}.attention.dense.weight"].T
        h = rms_norm(x, f"layers.{i}.post_attention_layernorm")
        gate, up = (h @ weights[f"layers.{i}.mlp.{name}.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weights[f"layers.{i}.mlp.down.weight"].T
    return project(weights, rms_norm(x, "final_norm"))


def logits(weights: Weights, x: Tensor) -> Tensor:
    return project(weights, layer_norm(x, weights["final_norm.weight"], weights["final_norm.bias"]))


def project(weights: Weights, x: Tensor) -> Tensor:
    head = weights["head.weight"] if "head.weight" in weights else weights["embedding.word_embeddings.weight"]
    return x @ head.T


def sample_order(prefix: Path, settings: dict[str, Any], num_samples: int) -> Iterator[Tensor]:
    """Samples of the training split in GPT-NeoX's order: documents shuffled, joined, cut, samples shuffled."""
    length = settings["seq_length"]
    index = prefix.with_suffix(".idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    sizes = np.frombuffer(index, np.int32, count, offset=34)
    ends = np.cumsum(sizes)
    stream = np.fromfile(prefix.with_suffix(".bin"), np.uint16)
    documents = [stream[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    shares = [float(share) for share in settings["split"].split(",")]
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / sum(shares) * count))
    excess = boundaries[-1] - count
    train_documents = np.arange(boundaries[1] - excess, dtype=np.int32)

    tokens = sum(len(documents[i]) for i in train_documents)
    epochs = 1
    while (epochs * tokens - 1) // length < num_samples:
        epochs += 1
    order = np.concatenate([train_documents] * epochs)
    rng = np.random.RandomState(settings["seed"])
    rng.shuffle(order)
    joined = np.concatenate([documents[i] for i in order]).astype(np.int64)
    shuffled = np.arange((len(joined) - 1) // length, dtype=np.uint32)
    rng.shuffle(shuffled)
    for i in shuffled.tolist():
        yield torch.from_numpy(joined[i * length : (i + 1) * length + 1])
