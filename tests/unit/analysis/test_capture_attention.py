"""Capture of attention probabilities: it changes no logit, and finds what the layers compute with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron.analysis import measure_attention
from megatron.analysis.capture_attention import captured_attention
from megatron.analysis.measure_attention import measure_checkpoint
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.model.attention import SelfAttention
from tests.helpers.tiny_checkpoints import MODELS, export, read_run, tokens, whole_model, write_yaml


def attentions(model: nn.Module) -> list[SelfAttention]:
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_capture_changes_no_logit(name: str, backend: str, tmp_path: Path) -> None:
    model = whole_model(read_run(write_yaml(tmp_path, MODELS[name])))
    function = CAUSAL_ATTENTION[backend].load()
    for attention in attentions(model):
        attention.core_attention = function
    seen: list[tuple[int, Tensor]] = []
    with torch.no_grad():
        before = model(tokens())
        with captured_attention(model, lambda layer, probabilities: seen.append((layer, probabilities))):
            during = model(tokens())
    assert torch.equal(before, during)
    assert [layer for layer, _ in seen] == list(range(len(model.layers)))
    for _, probabilities in seen:
        assert probabilities.shape == (3, 4, 16, 16)
        assert (probabilities.triu(1) == 0).all()
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 4, 16))
    assert all(attention.core_attention is function for attention in attentions(model))


def test_layers_are_as_before_when_the_body_fails(tokenformer: Checkpoint) -> None:
    model = whole_model(tokenformer.config)
    before = [attention.core_attention for attention in attentions(model)]
    with pytest.raises(RuntimeError, match="failed"), captured_attention(model, lambda layer, probabilities: None):
        raise RuntimeError("failed")
    assert [attention.core_attention for attention in attentions(model)] == before


def test_they_are_the_probabilities_of_transformers(
    pythia: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoModelForCausalLM

    folder = export(pythia, tmp_path_factory.mktemp("pythia") / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ours: list[Tensor] = []
    model = whole_model(pythia.config)
    with torch.no_grad():
        want = theirs(tokens(), output_attentions=True).attentions
        with captured_attention(model, lambda layer, probabilities: ours.append(probabilities)):
            model(tokens())
    assert len(ours) == len(want) == 2
    for found, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_sequences_are_averaged_however_many_are_read_at_a_time(
    at_a_time: int, pythia: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_attention, "PROBABILITIES_AT_A_TIME", at_a_time * 4 * 16**2)
    done: list[int] = []
    found = measure_checkpoint(pythia, tokens(), 0.8, done.append)
    assert done == [part for part in ([1, 1, 1] if at_a_time == 1 else [2, 1]) for _ in range(2)]
    alone = [measure_checkpoint(pythia, row.unsqueeze(0), 0.8, done.append) for row in tokens()]
    for name, values in found.items():
        assert values.shape == (2, 4)
        torch.testing.assert_close(values, torch.stack([one[name] for one in alone]).mean(0), rtol=1e-6, atol=1e-6)
