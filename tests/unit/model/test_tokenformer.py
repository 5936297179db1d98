"""The tokenformer architecture against an independent, straightforward re-implementation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.model.causal_lm import build_local
from tests.helpers.models import VOCAB, tiny_tokenformer

Weights = dict[str, Tensor]


def straightforward(model: ModelConfig, w: Weights, tokens: Tensor) -> Tensor:
    """Written from facts about the published model, one sample, one head and one position at a time where easy."""
    counts = model.param_tokens
    embedding = w["embedding.word_embeddings.weight"]
    x = embedding[tokens]
    for i in range(model.num_layers):
        p = f"layers.{i}"
        h = normalize(x)
        q, k, v = (
            pattend(h, w, f"{p}.attention.{name}", counts.theta, counts.qkv_scale_base)
            for name in ("query", "key", "value")
        )
        x = x + pattend(attend(model, q, k, v), w, f"{p}.attention.proj", counts.theta, counts.proj_scale_base)
        x = x + pattend(normalize(x), w, f"{p}.mlp", counts.theta, counts.ffn_scale_base)
    return (normalize(x) * w["final_norm.weight"] + w["final_norm.bias"]) @ embedding.T


def normalize(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)


def pattend(x: Tensor, w: Weights, name: str, theta: str, n: int) -> Tensor:
    s = torch.einsum("bsd,nd->bsn", x, w[f"{name}.key_tokens"])
    if theta == "softmax":
        a = torch.exp(s) / torch.exp(s).sum(-1, keepdim=True) * n
    elif theta == "gelu_l2_norm":
        a = gelu(s) / torch.linalg.norm(gelu(s), dim=-1, keepdim=True) * math.sqrt(n)
    else:
        a = gelu(s / torch.linalg.norm(s, dim=-1, keepdim=True) * math.sqrt(n))
    return torch.einsum("bsn,nd->bsd", a, w[f"{name}.value_tokens"])


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(model: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = model.hidden_size // model.num_attention_heads
    num_rotated = int(size * model.rotary_pct)
    outputs = []
    for head in range(model.num_attention_heads):
        part = slice(head * size, (head + 1) * size)
        qh, kh, vh = rotate(q[..., part], num_rotated), rotate(k[..., part], num_rotated), v[..., part]
        scores = qh @ kh.transpose(1, 2) / math.sqrt(size)
        mask = torch.tril(torch.ones(scores.shape[1:], dtype=torch.bool))
        outputs.append(torch.where(mask, scores, torch.tensor(-1e300, dtype=scores.dtype)).softmax(-1) @ vh)
    return torch.cat(outputs, -1)


def rotate(x: Tensor, num_rotated: int) -> Tensor:
    """Each pair as a complex number, turned by its angle; angles in float32 as the model computes them."""
    half = num_rotated // 2
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated)
    angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequencies
    turned = torch.complex(x[..., :half], x[..., half:num_rotated]) * torch.complex(
        angles.cos().double(), angles.sin().double()
    )
    return torch.cat((turned.real, turned.imag, x[..., num_rotated:]), -1)


CASES = {
    "l2_norm_gelu": ParamTokenConfig(qkv=24, proj=16, ffn=40),
    "gelu_l2_norm": ParamTokenConfig(qkv=24, proj=16, ffn=40, theta="gelu_l2_norm"),
    "softmax": ParamTokenConfig(qkv=24, proj=16, ffn=40, theta="softmax"),
    "pinned_scales": ParamTokenConfig(qkv=24, proj=16, ffn=40, qkv_scale_base=10, proj_scale_base=7, ffn_scale_base=3),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_agree(case: str) -> None:
    model = tiny_tokenformer(tokens=CASES[case])
    module = build_local(model, VOCAB, seed=9).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(8.0).add_(0.1 if "norm" in name else 0.0)  # scores of ordinary size
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    tokens = torch.randint(VOCAB.actual, (3, 16), generator=torch.Generator().manual_seed(1))
    got, want = module(tokens), straightforward(model, weights, tokens)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    for name, parameter in module.named_parameters():
        scale = float(weights[name].grad.abs().max())
        assert float((parameter.grad - weights[name].grad).abs().max()) < 1e-11 * scale, name


def test_bfloat16_keeps_angles_in_float32_and_results_finite() -> None:
    module = build_local(tiny_tokenformer(), VOCAB, seed=9)
    tokens = torch.randint(VOCAB.actual, (3, 16), generator=torch.Generator().manual_seed(1))
    want = module(tokens)
    half = module.bfloat16()(tokens)
    assert half.dtype == torch.bfloat16
    assert ((half.float() - want).norm() / want.norm()).item() < 0.05
