"""Configuration knows the variants by name, without torch; the registries hold exactly those."""

from __future__ import annotations

from typing import get_args

from megatron.config.architecture import ARCHITECTURES as ARCHITECTURE_FACTS
from megatron.config.sections.model import Activation, InitMethod, Norm, Theta
from megatron.kernels.pattention.theta import THETAS
from megatron.model.init_methods import INIT_METHODS
from megatron.model.layer_spec import ARCHITECTURES
from megatron.model.mlp import ACTIVATIONS
from megatron.model.norms import NORMS


def test_names_agree() -> None:
    for names, registry in (
        (Norm, NORMS),
        (Activation, ACTIVATIONS),
        (InitMethod, INIT_METHODS),
        (Theta, THETAS),
    ):
        assert sorted(get_args(names)) == sorted(registry)


def test_every_architecture_has_facts_and_a_layer() -> None:
    assert sorted(ARCHITECTURES) == sorted(ARCHITECTURE_FACTS)
