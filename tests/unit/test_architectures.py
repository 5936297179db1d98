"""Every architecture has a file on every floor that needs one."""

from __future__ import annotations

from typing import Any

from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES
from megatron.config.architecture import ARCHITECTURES as ARCHITECTURE_FACTS
from megatron.hf.hf_architecture import HF_ARCHITECTURES
from megatron.model.layer_spec import ARCHITECTURES as ARCHITECTURE_LAYERS
from megatron.planner.layer_costs import LAYER_COSTS
from megatron.registry import Registry

REGISTRIES: tuple[Registry[Any], ...] = (
    ARCHITECTURE_FACTS,
    LAYER_COSTS,
    ARCHITECTURE_LAYERS,
    HF_ARCHITECTURES,
    NEOX_ARCHITECTURES,
)


def missing_files() -> list[str]:
    """Lists the files to write: for each architecture that any registry has, those of the registries that lack it."""
    names = sorted({name for registry in REGISTRIES for name in registry})
    return [
        f"{registry.package}.{name}".replace(".", "/") + ".py"
        for name in names
        for registry in REGISTRIES
        if name not in registry
    ]


def test_every_architecture_has_its_files() -> None:
    missing = missing_files()
    assert not missing, f"write {', '.join(missing)}"


def test_the_files_that_an_architecture_lacks_are_named() -> None:
    ARCHITECTURE_FACTS.register("mamba")(ARCHITECTURE_FACTS["gpt_neox"])
    try:
        assert missing_files() == [
            "megatron/planner/layers/mamba.py",
            "megatron/model/architectures/mamba.py",
            "megatron/hf/architectures/mamba.py",
            "megatron/checkpointing/convert/neox/architectures/mamba.py",
        ]
    finally:
        ARCHITECTURE_FACTS.unregister("mamba")
