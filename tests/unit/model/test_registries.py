"""Configuration knows the variants by name, without torch; the registries hold exactly those."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from megatron.config.sections.model import Activation, InitMethod, Norm
from megatron.kernels.attention.causal_attention import CAUSAL_ATTENTION
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS
from megatron.model.init_methods import INIT_METHODS
from megatron.model.mlp import ACTIVATIONS, GATES
from megatron.model.norms import NORMS
from megatron.registry import Registry, variant_names


def test_names_agree() -> None:
    for names, registry in ((Norm, NORMS), (Activation, [*ACTIVATIONS, *GATES]), (InitMethod, INIT_METHODS)):
        assert sorted(get_args(names)) == sorted(registry)


@pytest.mark.parametrize("registry", [CAUSAL_ATTENTION, LAYER_NORM, PATTENTION, THETAS], ids=lambda each: each.kind)
def test_variants_are_called_by_their_modules(registry: Registry[Any]) -> None:
    assert list(registry) == variant_names(registry.package)
