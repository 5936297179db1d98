"""Optimizers as configuration declares them: AdamW, and one that a test adds by registering its facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from pydantic import PositiveInt, ValidationError

from megatron.config.effective_config import changed_values
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.optimizer import (
    OPTIMIZERS,
    Implementation,
    OptimizerConfig,
    OptimizerFacts,
    ParameterGroup,
    optimizer_facts,
)
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.sections.run_config import RunConfig, config_text
from megatron.errors import ConfigError
from tools.generate_config_docs import flat_schema

PYTHIA = Path(__file__).parent / "published_pythia.yml"


class SignConfig(OptimizerConfig):
    """Descent by the sign of a running mean."""

    type: Literal["Sign"] = "Sign"
    """Name."""

    momentum: float = 0.5
    """Decay of the running mean."""

    period: PositiveInt
    """Steps between two uses of it [steps]."""


@pytest.fixture
def sign() -> Iterator[None]:
    facts = OptimizerFacts(
        section=SignConfig,
        moments=("running_mean",),
        groups=(ParameterGroup("all", takes=lambda parameter: True, options=lambda section: {}),),
        implementations={"plain": Implementation("torch.optim:SGD", lambda section: {"lr": section.lr})},
    )
    OPTIMIZERS.register("sign")(facts)
    yield
    OPTIMIZERS.unregister("sign")


def loaded(*overrides: str) -> LoadedConfig:
    """Pythia with another optimizer: the file's dictionary is emptied first."""
    return load_config([PYTHIA], ["optimizer.params.betas=null", "optimizer.params.eps=null", *overrides])


def test_saved_adamw_reads_as_before() -> None:
    """The optimizer's part of a config.json, in the order and words of the checkpoints that exist."""
    saved = '{"type":"AdamW","lr":0.001,"betas":[0.9,0.95],"eps":1e-8,"weight_decay":0.1}'
    run = load_config([PYTHIA]).run
    text = run.model_dump_json()
    values = json.loads(text)
    values["training"]["optimizer"] = json.loads(saved)
    again = RunConfig.model_validate_json(json.dumps(values))
    assert again.training.optimizer == AdamWConfig(type="AdamW", lr=1e-3, betas=[0.9, 0.95])
    assert f'"optimizer":{saved}' in again.model_dump_json()


def test_adamw_says_what_checkpointing_and_training_need() -> None:
    facts = optimizer_facts("aDaM")
    assert facts is OPTIMIZERS["adamw"] and facts.names == ("Adam", "AdamW")
    section = AdamWConfig(lr=1e-3)
    assert facts.moments == ("exp_avg", "exp_avg_sq")
    assert [group.options(section) for group in facts.groups] == [{"weight_decay": 0.1}, {"weight_decay": 0.0}]
    assert {name: each.step_count for name, each in facts.implementations.items()} == {
        "torch AdamW": "parameter",
        "torch fused AdamW": "parameter",
        "apex FusedAdam": "group",
    }
    arguments = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    assert facts.implementations["torch AdamW"].arguments(section) == {**arguments, "fused": False}
    assert facts.implementations["apex FusedAdam"].arguments(section) == {**arguments, "adam_w_mode": True}


@pytest.mark.usefixtures("sign")
def test_a_registered_optimizer_is_configured_by_its_keys() -> None:
    result = loaded("optimizer.type=SIGN", "optimizer.params.momentum=0.25", "optimizer.params.period=3")
    section = result.run.training.optimizer
    assert section == SignConfig(lr=6e-4, momentum=0.25, period=3)
    assert str(result.origins["training.optimizer.period"]) == "command line"
    assert "training.optimizer.betas" not in result.origins
    assert RunConfig.model_validate_json(config_text(result.run)) == result.run
    changed = {each.key: (each.first, each.second) for each in changed_values(load_config([PYTHIA]).run, result.run)}
    assert changed["optimizer.params.period"] == (None, 3)
    assert changed["optimizer.params.eps"] == (1e-8, None)
    assert "period" in flat_schema()["properties"]["optimizer"]["properties"]["params"]["properties"]


@pytest.mark.usefixtures("sign")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.params.period=0"], "command line optimizer.params.period: 0: expected a whole number above 0"),
        ([], "missing key optimizer.params.period: expected a whole number above 0"),
        (
            ["optimizer.params.period=1", "apex_fused_adam=on"],
            "command line apex_fused_adam: on: the optimizer Sign has no such implementation; use auto or off",
        ),
    ],
)
def test_a_registered_optimizer_refuses_in_the_words_of_its_keys(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded("optimizer.type=Sign", *overrides)
    assert message in str(caught.value).splitlines()


@pytest.mark.usefixtures("sign")
def test_keys_of_another_optimizer_are_refused_where_they_stand() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([PYTHIA], ["optimizer.type=Sign", "optimizer.params.period=1", "optimizer.params.eps=null"])
    line = f"{PYTHIA}:12 optimizer.params.betas: [0.9, 0.95]"
    assert str(caught.value) == f"{line}: the optimizer Sign has no such key; it has lr, momentum, period"


def test_one_implementation_of_an_optimizer_can_be_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"torch_fused_adamw.*: cannot be on together with apex_fused_adam"):
        load_config([PYTHIA], ["apex_fused_adam=on", "torch_fused_adamw=on"])
    assert load_config([PYTHIA], ["apex_fused_adam=off", "torch_fused_adamw=on"]).run.speedups.torch_fused_adamw == "on"


@pytest.mark.usefixtures("sign")
def test_an_unknown_type_is_answered_with_all_that_are_registered() -> None:
    with pytest.raises(
        ConfigError, match=r"the optimizer Lion is not implemented; Adam, .* as in NeoX, is, and Muon, and Sign$"
    ):
        loaded("optimizer.type=Lion")


def test_keys_that_adamw_does_not_have() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([PYTHIA], ["optimizer.params.beta=1", "optimizer.params.momentum=0.9"])
    where = "command line optimizer.params."
    assert str(caught.value).splitlines()[1:] == [
        f"{where}beta: 1: the optimizer Adam has no such key; it has lr, betas, eps; did you mean betas?",
        f"{where}momentum: 0.9: known to NeoX, not supported here: Adam has no momentum beyond its betas",
    ]


def test_an_optimizer_that_is_not_registered() -> None:
    values = json.loads(load_config([PYTHIA]).run.model_dump_json())
    values["training"]["optimizer"]["type"] = "Sign"
    with pytest.raises(ValidationError, match="unknown optimizer 'Sign'; known: Adam, AdamW"):
        RunConfig.model_validate_json(json.dumps(values))
