"""The language model as a flat list of layers, the names of its parameters, and a plain module for one process.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig
from megatron.model.embedding import Head, TiedHead, TokenEmbedding, tied_logits
from megatron.model.kv_cache import KeyValueCache
from megatron.model.layer import TransformerLayer
from megatron.model.norms import NORMS
from megatron.mpu.collectives import gather_output
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters, shard_size


@dataclass(frozen=True)
class VocabSize:
    """The vocabulary; its padding never depends on the layout."""

    actual: int
    """Ids that the tokenizer can produce [tokens]."""
    padded: int
    """Rows of the embedding and of the head [tokens]."""

    def num_valid(self, model: ModelConfig) -> int | None:
        """Returns the rows that take part in the model's softmax; None for all, padding included."""
        return self.actual if model.mask_padded_vocab else None


@dataclass(frozen=True)
class LayerEntry:
    """One layer of the flat list: the prefix of its parameters' global names, and the module to build."""

    name: str
    module: type[nn.Module]
    arguments: tuple[Any, ...]

    def build(self) -> nn.Module:
        """Builds the layer, its parameters unset, on the default device."""
        return self.module(*self.arguments)


def layer_entries(model: ModelConfig, vocab: VocabSize, context: ParallelContext) -> list[LayerEntry]:
    """Lists the embedding, num_layers transformer layers, final norm and head: one entry per pipeline layer, in order.

    A tied head is an entry of type TiedHead under the embedding's name. Raises ConfigError, on the ranks of every
    stage alike, when vocabulary or sequence do not split over the tensor-parallel ranks.
    """
    shard_size(vocab.padded, context, "padded vocabulary")
    if context.sequence_parallel:
        shard_size(model.seq_length, context, "seq_length under sequence_parallel")
    modules: list[tuple[type[nn.Module], tuple[Any, ...]]] = [
        (TokenEmbedding, (model, vocab.padded, context)),
        *[(TransformerLayer, (model, context, index)) for index in range(model.num_layers)],
        (NORMS[model.final_norm or model.norm], (model, context)),
        (TiedHead if model.tie_embeddings else Head, (model, vocab.padded, context)),
    ]
    return [LayerEntry(name, *module) for name, module in zip(layer_names(model), modules, strict=True)]


def layer_names(model: ModelConfig) -> list[str]:
    """Lists the prefix of each pipeline layer's global names, by its index; a tied head shares the embedding's."""
    layers = [f"layers.{i}" for i in range(model.num_layers)]
    return ["embedding", *layers, "final_norm", "embedding" if model.tie_embeddings else "head"]


def global_name(layer_index: int, local_name: str, model: ModelConfig) -> str:
    """Returns the global name of a pipeline layer's parameter: (3, "mlp.key_tokens") is layers.2.mlp.key_tokens."""
    return f"{layer_names(model)[layer_index]}.{local_name}"


def pipeline_location(name: str, model: ModelConfig) -> tuple[int, str]:
    """Returns the pipeline layer index and local name of a global parameter name; for tied weights, the embedding's.

    Raises KeyError for a name that no layer of this model owns.
    """
    for index, prefix in enumerate(layer_names(model)):
        if name.startswith(f"{prefix}."):
            return index, name.removeprefix(f"{prefix}.")
    raise KeyError(name)


class LocalCausalLM(nn.Module):
    """The whole model in one module, without a pipeline; parameters carry their global names."""

    def __init__(self, model: ModelConfig, vocab: VocabSize, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        embedding, *layers, final_norm, head = layer_entries(model, vocab, context)
        self.embedding = cast(TokenEmbedding, embedding.build())
        self.layers = nn.ModuleList(entry.build() for entry in layers)
        self.final_norm = final_norm.build()
        self.head = None if model.tie_embeddings else head.build()

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Computes logits [B, S, V] over the padded vocabulary, whole on every tensor-parallel rank, from token ids."""
        return gather_output(self.local_logits(self.hidden_states(tokens_BS)), -1, self.context)

    def hidden_states(self, tokens_BS: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Computes the head's input [B, S, D] from token ids; with a cache, they follow the tokens that it has seen."""
        if cache is not None:
            cache.begin(tokens_BS.shape[1])
        x_BSD: Tensor = self.embedding(tokens_BS, cache)
        for index, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD) if cache is None else layer(x_BSD, cache.layers[index])
        normalized_BSD: Tensor = self.final_norm(x_BSD)
        return normalized_BSD

    def local_logits(self, x_BSD: Tensor) -> Tensor:
        """Computes this rank's share of the logits [B, S, V/tp] from the head's input."""
        return tied_logits(self.embedding, x_BSD) if self.head is None else self.head(x_BSD)

    def new_cache(self, batch: int, capacity: int, padding_B: Tensor | None = None) -> KeyValueCache:
        """Returns an empty cache for `batch` sequences of up to `capacity` columns, as this rank's layers fill it.

        `padding_B` as in KeyValueCache.
        """
        weight = self.embedding.word_embeddings.weight
        attention = cast(TransformerLayer, self.layers[0]).attention
        return KeyValueCache(
            num_layers=len(self.layers),
            batch=batch,
            num_kv_heads=attention.num_kv_heads,
            capacity=capacity,
            head_size=attention.head_size,
            dtype=weight.dtype,
            device=weight.device,
            padding_B=padding_B,
        )


def build_local(
    model: ModelConfig, vocab: VocabSize, seed: int | None, context: ParallelContext | None = None
) -> LocalCausalLM:
    """Builds the model for inference, conversion, analysis and growth, on the default device.

    `seed` sets the weights exactly as training with that seed starts; None leaves them unset, to be loaded, and works
    on the meta device too.
    """
    context = context or ParallelContext.single()
    module = LocalCausalLM(model, vocab, context)
    if seed is not None:
        initialize_parameters(module.named_parameters(), seed, context)
    return module


def global_parameters(
    named_parameters: Iterator[tuple[str, nn.Parameter]], model: ModelConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields a DeepSpeed PipelineModule's parameters under their global names."""
    for name, parameter in named_parameters:
        yield from_engine_name(name, model), parameter


def from_engine_name(name: str, model: ModelConfig) -> str:
    """Returns the global name, the same in every layout, of a parameter of a DeepSpeed PipelineModule.

    There it is called `{layer index}.{local name}`, and `tied_modules.embedding.{local name}` for tied layers.
    """
    index, _, local = name.partition(".")
    return local if index == "tied_modules" else global_name(int(index), local, model)
