"""Torch's dtypes by the configuration's names of number formats."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By `precision.dtype`."""
