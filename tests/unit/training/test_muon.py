"""Muon's arithmetic on one rank: Newton-Schulz by singular values, a step by torch's own Muon; its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from megatron.checkpointing.engine.flat_partitions import Fragment
from megatron.checkpointing.states.read_zero_files import EngineState
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.optimizer import OPTIMIZERS
from megatron.config.optimizers.muon import MuonConfig
from megatron.errors import ConfigError
from megatron.growth.engine_restart import restarted_engine
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import new_parameter, zeros
from megatron.training.lr_scheduler import LRScheduler
from megatron.training.optimizer import build_optimizer, parameter_groups
from megatron.training.optimizers.muon import OrthogonalizedMomentum, newton_schulz
from tests.helpers.configs import GPT2, TOKENFORMER
from tests.helpers.plain_torch import nearly_orthogonal

KEYS = {"optimizer": {"type": "Muon", "params": {"lr": 4e-3, "adam_lr": 1e-3, "betas": [0.9, 0.95]}}}


@pytest.mark.parametrize("shape", [(40, 32), (32, 40), (8, 8), (1, 5), (5, 1)])
def test_newton_schulz_acts_on_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(newton_schulz(matrix, 5), nearly_orthogonal(matrix), rtol=0, atol=1e-12)
    assert (newton_schulz(matrix.float(), 5) - newton_schulz(matrix, 5)).abs().max() < 1e-5
    assert not newton_schulz(torch.zeros(shape), 5).any()


def test_steps_are_those_of_torch_and_of_its_adamw() -> None:
    """Two matrices by Muon and one by AdamW in flat tensors, against torch's own optimizers of each by itself."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(6, 4), (3, 8)]
    context = ParallelContext.single()
    hidden = [new_parameter(shape, zeros, context, what="it") for shape in shapes]
    flat = [nn.Parameter(torch.randn(48 + 3, generator=generator)), nn.Parameter(torch.randn(5, generator=generator))]
    section = MuonConfig(lr=0.02, adam_lr=0.01, ns_dtype="bf16", weight_decay=0.3)
    facts = OPTIMIZERS["muon"]
    groups = [
        {"params": [each]} | group.options(section) for each, group in zip(flat, facts.groups[:2], strict=True)
    ]  # fmt: skip
    ours = OrthogonalizedMomentum(groups, **facts.implementations["Muon, torch AdamW"].arguments(section))
    places = [slice(0, 24), slice(24, 48)]
    held = [Fragment(each, slice(0, 24), place) for each, place in zip(hidden, places, strict=True)]
    ours.use_partitions([held, []], context)
    matrices = [
        nn.Parameter(flat[0].detach()[place].view(shape).clone()) for place, shape in zip(places, shapes, strict=True)
    ]
    vector = nn.Parameter(flat[1].detach().clone())
    theirs = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.3, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([vector], lr=0.01, betas=section.betas, weight_decay=0.3)
    for rate in (1.0, 0.5):
        for group in ours.param_groups:
            group["lr"] = rate * 0.02 * group["lr_ratio"]
        theirs.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = rate * 0.02, rate * 0.01
        for each in flat:
            each.grad = torch.randn(each.shape, generator=generator)
        flat[0].grad[48:] = 0
        for matrix, place in zip(matrices, places, strict=True):
            matrix.grad = flat[0].grad[place].view(matrix.shape).clone()
        vector.grad = flat[1].grad.clone()
        for each in (ours, theirs, adamw):
            each.step()
    for matrix, place in zip(matrices, places, strict=True):
        torch.testing.assert_close(flat[0].detach()[place], matrix.detach().flatten(), rtol=0, atol=1e-6)
    assert torch.equal(flat[1], vector)
    assert not ours.state[flat[0]]["momentum_buffer"][48:].any()


def loaded(tmp_path: Path, base: dict[str, Any] = TOKENFORMER, **changes: Any) -> LoadedConfig:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(base | KEYS | {"data_path": "nothing/here"} | changes))
    return load_config([path])


@pytest.mark.parametrize("base", [TOKENFORMER, GPT2], ids=["tokenformer", "gpt2"])
def test_matrices_of_layers_are_muons_and_the_rest_is_adamws(base: dict[str, Any], tmp_path: Path) -> None:
    run = loaded(tmp_path, base).run
    module = build_local(run.model, VocabSize(512, 512), seed=0)
    names = {parameter: name for name, parameter in module.named_parameters()}
    matrices, decayed, others = (
        {names[parameter] for parameter in group["params"]}
        for group in parameter_groups(module, run.training.optimizer)
    )
    assert all(name.startswith("layers.") for name in matrices) and len(matrices) > 8
    assert decayed == {name for name in names.values() if name.startswith(("embedding.", "head."))}
    assert all("norm" in name or name.endswith("bias") for name in others)
    optimizer = build_optimizer(module, run.training.optimizer, "Muon, torch AdamW")
    schedule = run.training.lr_schedule.model_copy(update={"style": "constant", "warmup": 0.0})
    scheduler = LRScheduler(optimizer, peak=run.training.optimizer.lr, schedule=schedule, train_iters=10)
    assert scheduler.learning_rate == 4e-3
    assert scheduler.get_last_lr() == pytest.approx([4e-3, 1e-3, 1e-3], rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"muon_lr": 1e-3},
            "muon_lr: 0.001: known to NeoX, not supported here: the learning rate of the hidden matrices",
        ),
        ({"adjust_lr_fn": "original"}, "only match_rms_adamw is accepted"),
        ({"ns_dtype": "fp16"}, "ns_dtype: fp16: expected one of fp32, bf16"),
        ({"momentum": 1.0}, "momentum: 1.0: expected"),
    ],
)
def test_keys_are_refused_with_a_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    params = KEYS["optimizer"]["params"] | changes
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, optimizer={"type": "Muon", "params": params})
    assert message in str(caught.value)


def test_a_schedule_that_begins_anew_keeps_the_ratio_of_the_rates(tmp_path: Path) -> None:
    training = loaded(tmp_path, lr_decay_style="constant", warmup=0.0).run.training
    groups = {"hidden matrices": {"lr": 1.0, "lr_ratio": 1.0}, "decayed": {"lr": 0.25, "lr_ratio": 0.25}}
    engine = EngineState({"lr_scheduler": {"num_steps": 5}}, "fp32", groups, clip_grad=1.0, loss_scale={})
    again = restarted_engine(engine, training, schedule=True, moments=False)
    assert {name: group["lr"] for name, group in again.hyperparameters.items()} == {
        "hidden matrices": 4e-3,
        "decayed": 1e-3,
    }
    assert again.counters["lr_scheduler"] == {"num_steps": 0}


def test_freezing_rows_after_growth_is_refused(tmp_path: Path) -> None:
    grow = {"operator": "zero_key", "at_step": 5, "ffn_slot_num": 96, "old_rows_lr": 0, "old_rows_iters": 3}
    with pytest.raises(ConfigError, match=r"grow\.old_rows_lr.*: the optimizer Muon steps whole matrices"):
        loaded(tmp_path, save="somewhere", ffn_scale_base=48, grow=grow)
    slowed = loaded(tmp_path, save="somewhere", ffn_scale_base=48, grow=grow | {"old_rows_lr": 0.5})
    assert slowed.run.grow is not None and slowed.run.grow.old_rows_lr == 0.5
