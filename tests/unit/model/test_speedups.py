"""Optional speed-ups: what is chosen where, and that what replaces torch's functions is called as they are."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.errors import EnvironmentSetupError
from megatron.kernels import backends, triton_runtime
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.backends import Backend
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.rotary.rotary import ROTARY
from megatron.model.causal_lm import build_local
from megatron.model.speedups import SLOTS, Speedups, apply_speedups, choose_speedups
from megatron.training.optimizer import build_optimizer
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

ADAMW = AdamWConfig(lr=1e-2, betas=[0.9, 0.95])
FP32, BF16 = PrecisionConfig(dtype="fp32"), PrecisionConfig(dtype="bf16")


def speedups(
    attention: str = "sdpa",
    layer_norm: str = "native",
    optimizer: str = "torch AdamW",
    *,
    own: str = "eager",
    compile: bool = False,  # noqa: A002 - the field's name
    fused_cross_entropy: bool = False,
    missed: tuple[str, ...] = (),
) -> Speedups:
    """Names the backends by their names in the registries, `own` those of the engine's own kernels."""
    kernels = {
        "attention": CAUSAL_ATTENTION[attention],
        "pattention": PATTENTION[own],
        "rotary": ROTARY[own],
        "layer norm": LAYER_NORM[layer_norm],
    }
    return Speedups(kernels, optimizer, compile, fused_cross_entropy, missed)


PLAIN = speedups()


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes this a machine on which Triton is installed and compiles."""
    monkeypatch.setitem(sys.modules, "triton", sys.modules.get("triton") or stand_in("triton"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(triton_runtime.Path, "is_file", lambda path: True)
    return monkeypatch


def stand_in(name: str, **functions: Any) -> types.ModuleType:
    """Makes a package of a few functions."""
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.__path__ = []
    module.__dict__.update(functions)
    return module


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """Stand-ins for flash-attn and apex that compute with torch and note their calls."""
    calls: dict[str, list[Any]] = {"flash": [], "norm": [], "adam": []}

    def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float, softmax_scale: float | None, causal: bool) -> Any:
        calls["flash"].append((dropout_p, causal))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {"dropout_p": dropout_p, "is_causal": causal, "scale": softmax_scale}
        attended = F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=q.shape[1] != k.shape[1])
        return attended.transpose(1, 2)

    def fused_layer_norm(x: Any, shape: Any, eps: float) -> Any:
        calls["norm"].append("plain")
        return F.layer_norm(x, shape, eps=eps)

    def fused_layer_norm_affine(x: Any, weight: Any, bias: Any, shape: Any, eps: float) -> Any:
        calls["norm"].append("affine")
        return F.layer_norm(x, shape, weight, bias, eps)

    def fused_adam(groups: Any, **settings: Any) -> Any:
        calls["adam"].append(settings)
        settings.pop("adam_w_mode")
        return torch.optim.AdamW(groups, **settings)

    contents = {
        "flash_attn": {"flash_attn_func": flash_attn_func},
        "apex": {},
        "apex.normalization": {},
        "apex.normalization.fused_layer_norm": {
            "fused_layer_norm": fused_layer_norm,
            "fused_layer_norm_affine": fused_layer_norm_affine,
        },
        "apex.optimizers": {"FusedAdam": fused_adam},
    }
    for name, functions in contents.items():
        monkeypatch.setitem(sys.modules, name, stand_in(name, **functions))
    yield calls


def test_a_cpu_without_packages_uses_torch_alone() -> None:
    assert choose_speedups(SpeedupsConfig(), BF16, ADAMW, on_gpu=False) == PLAIN


def test_a_gpu_uses_torchs_fused_adam_and_triton_without_packages(triton: pytest.MonkeyPatch) -> None:
    chosen = choose_speedups(SpeedupsConfig(), BF16, ADAMW, on_gpu=True, theta="softmax")
    assert chosen == speedups(optimizer="torch fused AdamW", own="triton", fused_cross_entropy=True)
    assert str(chosen) == (
        "attention torch SDPA | pattention triton | rotary triton | layer norm torch | head and loss in chunks | "
        "optimizer torch fused AdamW | not compiled"
    )


@pytest.mark.parametrize("lacking", ["package", "compiler", "headers", "formulas"])
def test_without_triton_or_what_it_needs_auto_says_why_it_is_eager(triton: pytest.MonkeyPatch, lacking: str) -> None:
    """One line for each operation; the explicit choice is an error with the same reason."""
    reason = {
        "package": "the package 'triton' is not installed",
        "compiler": "there is no 'no-such-compiler'",
        "headers": "no .*Python.h",
        "formulas": "'mean_relu' has no formulas in Triton, only gelu_l2_norm, l2_norm_gelu, softmax have",
    }[lacking]
    theta = "mean_relu" if lacking == "formulas" else "softmax"
    if lacking == "package":
        triton.setattr(backends, "is_installed", lambda package: package != "triton")
    elif lacking == "compiler":
        triton.setenv("CC", "no-such-compiler")
    elif lacking == "headers":
        triton.setattr(triton_runtime.Path, "is_file", lambda path: False)
    chosen = choose_speedups(SpeedupsConfig(), BF16, ADAMW, on_gpu=True, theta=theta)
    assert chosen.kernels["pattention"] is PATTENTION["eager"]
    assert re.match(f"pattention: auto takes eager, not triton: .*{reason}", chosen.missed[0])
    assert [line.partition(":")[0] for line in chosen.missed] == ["pattention", "rotary"][: len(chosen.missed)]
    with pytest.raises(EnvironmentSetupError, match=f"pattention: triton: .*{reason}"):
        choose_speedups(SpeedupsConfig(pattention="triton"), BF16, ADAMW, on_gpu=True, theta=theta)


def test_a_named_backend_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_speedups(SpeedupsConfig(pattention="reference", rotary="reference"), BF16, ADAMW, on_gpu=False)
    assert (chosen.kernels["pattention"], chosen.kernels["rotary"]) == (PATTENTION["reference"], ROTARY["reference"])
    monkeypatch.setitem(sys.modules, "triton", stand_in("triton"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        EnvironmentSetupError, match="pattention: triton: Triton compiles for GPUs, and torch sees none"
    ):
        choose_speedups(SpeedupsConfig(pattention="triton"), BF16, ADAMW, on_gpu=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentSetupError, match=r"pattention: compile: .* there is no 'no-such-compiler'"):
        choose_speedups(SpeedupsConfig(pattention="compile"), BF16, ADAMW, on_gpu=False)


def test_auto_takes_what_is_installed_and_fits(packages: dict[str, list[Any]], triton: pytest.MonkeyPatch) -> None:
    chosen = choose_speedups(SpeedupsConfig(), BF16, ADAMW, on_gpu=True)
    assert chosen == speedups("flash_attn", "apex", "apex FusedAdam", own="triton", fused_cross_entropy=True)
    assert choose_speedups(SpeedupsConfig(), FP32, ADAMW, on_gpu=True).kernels["attention"].label == "torch SDPA"
    assert choose_speedups(SpeedupsConfig(), BF16, ADAMW, on_gpu=False) == PLAIN


def test_off_leaves_it_out(packages: dict[str, list[Any]]) -> None:
    off = SpeedupsConfig(
        flash_attention="off",
        apex_fused_adam="off",
        apex_fused_layernorm="off",
        torch_fused_adamw="off",
        fused_cross_entropy="off",
        pattention="eager",
        rotary="eager",
    )
    assert choose_speedups(off, BF16, ADAMW, on_gpu=True) == PLAIN


@pytest.mark.parametrize("key", ["flash_attention", "apex_fused_adam", "apex_fused_layernorm"])
def test_on_without_the_package_says_how_to_get_it(key: str) -> None:
    with pytest.raises(EnvironmentSetupError, match=rf"{key}: on: .* not installed\. Install it with"):
        choose_speedups(SpeedupsConfig(**{key: "on"}), BF16, ADAMW, on_gpu=True)


def test_on_where_it_cannot_work(packages: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EnvironmentSetupError, match="needs a GPU"):
        choose_speedups(SpeedupsConfig(flash_attention="on"), BF16, ADAMW, on_gpu=False)
    with pytest.raises(EnvironmentSetupError, match="this run is in fp32"):
        choose_speedups(SpeedupsConfig(flash_attention="on"), FP32, ADAMW, on_gpu=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentSetupError, match="there is no 'no-such-compiler'"):
        choose_speedups(SpeedupsConfig(torch_compile="on"), FP32, ADAMW, on_gpu=False)


@pytest.mark.parametrize(
    "model",
    [tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_gpt2(use_bias_in_norms=False), tiny_llama()],
    ids=["tokenformer", "pythia", "gpt2", "gpt2 without biases in norms", "llama"],
)
def test_replaced_functions_compute_the_same(model: Any, packages: dict[str, list[Any]]) -> None:
    plain, fast = build_local(model, VOCAB, seed=1), build_local(model, VOCAB, seed=1)
    apply_speedups(fast, speedups("flash_attn", "apex"))
    tokens = torch.randint(0, VOCAB.actual, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(tokens), plain(tokens), rtol=0, atol=0)
    assert packages["flash"] == [(0.0, True)] * model.num_layers
    inside = "plain" if model.norm == "layernorm_nonparam" else "affine"
    norms = [inside] * (2 * model.num_layers) + ["affine"]
    assert packages["norm"] == ([] if model.norm == "rmsnorm" else norms)


@pytest.mark.parametrize(
    "model",
    [tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_llama()],
    ids=["tokenformer", "pythia", "gpt2", "llama"],
)
def test_every_operation_can_be_replaced_by_its_reference(model: Any) -> None:
    plain, spelled_out = (build_local(model, VOCAB, seed=1).double() for _ in range(2))
    references = {slot.operation.kind: slot.operation["reference"] for slot in SLOTS}
    calls = []

    def counted(operation: str) -> Backend[Any]:
        function = references[operation].load()
        return replace(references[operation], load=lambda: lambda *a, **k: calls.append(operation) or function(*a, **k))

    apply_speedups(spelled_out, Speedups({kind: counted(kind) for kind in references}, "torch AdamW", compile=False))
    tokens = torch.randint(0, VOCAB.actual, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spelled_out(tokens), plain(tokens), rtol=1e-12, atol=1e-12)
    absent = {
        "pattention": model.param_tokens is None,
        "rotary": model.pos_emb != "rotary",
        "layer norm": model.norm == "rmsnorm",
    }
    assert set(calls) == {operation for operation in references if not absent.get(operation)}


def test_optimizers_take_the_same_step(packages: dict[str, list[Any]]) -> None:
    def stepped(implementation: Any) -> list[torch.Tensor]:
        module = build_local(tiny_tokenformer(), VOCAB, seed=1)
        optimizer = build_optimizer(module, AdamWConfig(lr=1e-2, betas=[0.9, 0.95]), implementation)
        for parameter in module.parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.01
        optimizer.step()
        return list(module.parameters())

    plain = stepped("torch AdamW")
    for implementation in ("torch fused AdamW", "apex FusedAdam"):
        for ours, theirs in zip(stepped(implementation), plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    assert packages["adam"][0] == {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def test_compiled_layers_keep_names_and_weights() -> None:
    plain, compiled = build_local(tiny_tokenformer(), VOCAB, 1), build_local(tiny_tokenformer(), VOCAB, 1)
    apply_speedups(compiled, speedups(compile=True))
    assert list(compiled.state_dict()) == list(plain.state_dict())


@pytest.mark.full
def test_compiled_layers_compute_the_same() -> None:
    plain, compiled = build_local(tiny_tokenformer(), VOCAB, 1), build_local(tiny_tokenformer(), VOCAB, 1)
    apply_speedups(compiled, speedups(compile=True))
    tokens = torch.randint(0, VOCAB.actual, (2, 8), generator=torch.Generator().manual_seed(0))
    for module in (plain, compiled):
        module(tokens).logsumexp(-1).mean().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
