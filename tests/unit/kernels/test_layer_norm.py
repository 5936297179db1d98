"""Layer normalization: every backend against the definition, outputs and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from megatron.kernels.layer_norm.backends.reference import layer_norm_reference
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM
from tests.helpers.kernel_backends import assert_near, fast_backends, load_backend, outputs_and_gradients, seeded


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", fast_backends(LAYER_NORM))
def test_backend_computes_the_definition(name: str, affine: bool) -> None:
    backend = load_backend(LAYER_NORM, name)
    x, weight, bias, probe = backend.prepared(seeded((3, 5, 16), (16,), (16,), (3, 5, 16)))
    inputs = [x, weight, bias] if affine else [x]

    def by(function, leaves: Sequence[Tensor]) -> Tensor:
        weight, bias = leaves[1:] if affine else (None, None)
        return function(leaves[0], (16,), weight, bias, 1e-5)

    got = outputs_and_gradients(lambda leaves: by(backend.function, leaves), inputs, probe)
    wide = [tensor.cpu().double() for tensor in (*inputs, probe)]
    want = outputs_and_gradients(lambda leaves: by(layer_norm_reference, leaves), wide[:-1], wide[-1])
    assert_near(got, want, backend.tolerance)
