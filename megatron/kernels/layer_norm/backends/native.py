"""PyTorch's own layer normalization."""

from __future__ import annotations

import torch.nn.functional as F

from megatron.kernels.backends import Backend
from megatron.kernels.layer_norm.layer_norm import LAYER_NORM

LAYER_NORM.register("native")(Backend(label="torch", rank=0, load=lambda: F.layer_norm))
