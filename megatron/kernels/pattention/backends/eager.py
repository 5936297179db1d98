"""Pattention by torch's own operations: runs everywhere."""

from __future__ import annotations

from megatron.kernels.backends import Backend
from megatron.kernels.pattention.blocked_passes import BlockedPasses
from megatron.kernels.pattention.closed_form import closed_form_pattention
from megatron.kernels.pattention.pattention import PATTENTION

PATTENTION.register("eager")(Backend(label="eager", rank=0, load=lambda: closed_form_pattention(BlockedPasses)))
