"""Checks of the section `model`, in every layout."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

from megatron.config.architecture import ARCHITECTURES
from megatron.config.checks.finding import Check, Finding, nearest_multiple
from megatron.config.model_size import count_parameters
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.token_share import TOKEN_KEYS


def _activation(run: RunConfig) -> Iterator[Finding]:
    name = run.model.architecture
    known = ARCHITECTURES[name].activations
    if run.model.activation not in known and "activation" not in ARCHITECTURES[name].fixed:
        yield Finding("model.activation", f"the architecture {name} has {' and '.join(known)} alone")


def _rotary_dimensions(run: RunConfig) -> Iterator[Finding]:
    model = run.model
    if model.pos_emb != "rotary" or model.hidden_size % model.num_attention_heads:
        return
    head_dim = model.hidden_size // model.num_attention_heads
    rotated = int(head_dim * model.rotary_pct)
    if rotated < 2 or rotated % 2:
        yield Finding(
            "model.rotary_pct",
            f"rotates {rotated} of the {head_dim} dimensions of a head; rotary positions need an even number above 0",
        )


def _positions(run: RunConfig) -> Iterator[Finding]:
    length, longest = run.model.seq_length, run.model.max_position_embeddings
    if length > longest:
        learned = ", which are the positions that the model learns" if run.model.pos_emb == "learned" else ""
        yield Finding(
            "model.seq_length", f"is above max_position_embeddings {longest}{learned}; raise that, or shorten this"
        )


def _padded_vocabulary(run: RunConfig) -> Iterator[Finding]:
    padded, multiple = run.model.padded_vocab_size, run.model.make_vocab_size_divisible_by
    if padded is not None and padded % multiple:
        yield Finding(
            "model.padded_vocab_size",
            f"is not a multiple of make_vocab_size_divisible_by {multiple}; nearest valid value: "
            f"{nearest_multiple(padded, multiple)}",
        )


def _fixed_by_architecture(run: RunConfig) -> Iterator[Finding]:
    for path, fixed in ARCHITECTURES[run.model.architecture].fixed.items():
        if attrgetter(path)(run.model) != fixed.value:
            yield Finding(f"model.{path}", fixed.reason)
    for name in ARCHITECTURES:
        for path in ARCHITECTURES[name].own_fields if name != run.model.architecture else ():
            if attrgetter(path)(run.model) != ModelConfig.model_fields[path].default:
                yield Finding(f"model.{path}", f"belongs to architecture: {name}, and this is {run.model.architecture}")


def _param_token_groups(run: RunConfig) -> Iterator[Finding]:
    tokens = run.model.param_tokens
    if tokens is None:
        return
    for field in TOKEN_KEYS:
        count = getattr(tokens, field)
        if count % tokens.groups:
            yield Finding(
                f"model.param_tokens.{field}",
                f"does not split into param_token_groups {tokens.groups} equal blocks; nearest valid value: "
                f"{nearest_multiple(count, tokens.groups)}",
            )


_MOST_PARAMETERS = 10**14


def _parameters_are_countable(run: RunConfig) -> Iterator[Finding]:
    model = run.model
    count = count_parameters(model, model.padded_vocab_size or model.make_vocab_size_divisible_by)
    if count > _MOST_PARAMETERS:
        yield Finding(
            "model.num_layers",
            f"makes {count:,} parameters with hidden_size {model.hidden_size}; is one of the sizes mistyped?",
        )


CHECKS: tuple[Check, ...] = (
    _activation,
    _rotary_dimensions,
    _positions,
    _padded_vocabulary,
    _fixed_by_architecture,
    _param_token_groups,
    _parameters_are_countable,
)
