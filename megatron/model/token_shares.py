"""Shares of the parameter tokens that the Pattentions of a rank read in elastic training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import tokens_of_share
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext

SUBLAYERS = {"qkv": "attention.qkv", "proj": "attention.proj", "ffn": "mlp"}
"""Sublayers of a layer that read one share each, by the field of their token count."""

Shares = Mapping[str, float]
"""Share by sublayer of the whole model, such as `layers.3.attention.qkv`; sublayers that are missing read all."""


def sublayer_names(model: ModelConfig) -> list[str]:
    """Lists the sublayers of the whole model that have a share each, in the order of the pipeline."""
    return [f"layers.{layer}.{local}" for layer in range(model.num_layers) for local in SUBLAYERS.values()]


def sublayer_of(parameter: str) -> str:
    """Returns the sublayer of a Pattention's parameter: layers.3.attention.key.key_tokens is of
    layers.3.attention.qkv."""
    sublayer, _, _ = parameter.rpartition(".")
    layer, _, last = sublayer.rpartition(".")
    return f"{layer}.qkv" if last in ("query", "key", "value") else sublayer


class TokenShares:
    """The shares that the Pattentions of a rank read; each rank reads its part of a share, as large as any other's."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        named: Iterable[tuple[str, nn.Parameter]],
        groups: int,
        context: ParallelContext,
    ) -> None:
        """Takes the rank's modules, its parameters by global name, and the groups over all tensor-parallel ranks."""
        names = {parameter: name for name, parameter in named}
        self.groups = groups // context.tensor_size
        self.shares: Shares = {}
        self._layers: dict[str, list[Pattention]] = {}
        for module in modules:
            if isinstance(module, Pattention):
                self._layers.setdefault(sublayer_of(names[module.key_tokens]), []).append(module)

    def read(self, shares: Shares) -> None:
        """Reads these shares from now on. Raises ValueError for one that is no whole number of tokens of each group."""
        if shares == self.shares:
            return
        self.shares = shares
        for name, layers in self._layers.items():
            for layer in layers:
                share = shares.get(name, 1.0)
                tokens = tokens_of_share(len(layer.key_tokens), self.groups, share)
                if tokens is None:
                    raise ValueError(f"{name}: {share} of {len(layer.key_tokens)} tokens in {self.groups} groups")
                layer.read_share(self.groups, tokens // self.groups)

    @contextmanager
    def reading(self, shares: Shares) -> Iterator[None]:
        """Reads these shares inside, and then again those from before."""
        before = self.shares
        self.read(shares)
        try:
            yield
        finally:
            self.read(before)
