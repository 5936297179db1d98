"""Checks of the sections `elastic` and `reading`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig
from megatron.config.token_share import TOKEN_KEYS, nearest_share, tokens_of_share

_SHARES = "elastic.shares"


def _has_tokens(run: RunConfig) -> Iterator[Finding]:
    if run.model.param_tokens is not None:
        return
    reason = f"architecture {run.model.architecture} has no parameter tokens; leave it out"
    if run.elastic is not None:
        yield Finding(_SHARES, reason)
    if run.reading is not None:
        for name, unset in (("share", 1.0), ("top_k", None), ("shares", None), ("top_ks", None)):
            if getattr(run.reading, name) != unset:
                yield Finding(f"reading.{name}", reason)


def _shares(run: RunConfig) -> Iterator[Finding]:
    elastic = run.elastic
    if elastic is None:
        return
    if len(set(elastic.shares)) < len(elastic.shares):
        yield Finding(_SHARES, "names a share twice")
    if elastic.full_model == "sampled" and 1.0 not in elastic.shares:
        yield Finding(
            _SHARES,
            "lacks 1, so that tokens beyond the largest share would never be trained; add 1, or let elastic.full_model "
            "be alternate or always",
        )
    if elastic.full_model != "sampled" and not elastic.smaller_shares:
        yield Finding(_SHARES, f"has no share below 1 for elastic.full_model {elastic.full_model}; add one, such as "
                      "0.5")  # fmt: skip


def _shares_are_whole(run: RunConfig) -> Iterator[Finding]:
    tokens = run.model.param_tokens
    if run.elastic is None or tokens is None:
        return
    for key, count in ((key, getattr(tokens, field)) for field, key in TOKEN_KEYS.items()):
        for share in () if count % tokens.groups else run.elastic.shares:
            if tokens_of_share(count, tokens.groups, share) is None:
                yield Finding(
                    _SHARES,
                    f"{share:g} takes no whole number of tokens of each of the {tokens.groups} groups of {key} "
                    f"{count}; nearest: {nearest_share(count, tokens.groups, share)}",
                )


def _groups_split(run: RunConfig) -> Iterator[Finding]:
    tokens, ranks = run.model.param_tokens, run.parallel.model_parallel_size
    if run.elastic is None or tokens is None or tokens.groups % ranks == 0:
        return
    nearest = math.lcm(tokens.groups, ranks)
    yield Finding(
        "model.param_tokens.groups",
        f"is no multiple of model_parallel_size {ranks}, so that tensor-parallel ranks would hold unequal shares; use "
        f"{nearest}",
    )


def _distillation(run: RunConfig) -> Iterator[Finding]:
    elastic = run.elastic
    if elastic is None:
        return
    if elastic.distillation_weight and elastic.full_model != "always":
        yield Finding("elastic.distillation_weight", "needs elastic.full_model: always, which computes the whole model "
                      "in the same step")  # fmt: skip
    if elastic.temperature != 1.0 and not elastic.distillation_weight:
        yield Finding("elastic.temperature", "needs elastic.distillation_weight: the weight of the divergence that it "
                      "belongs to")  # fmt: skip
    if elastic.distillation_weight and run.speedups.fused_cross_entropy == "on":
        yield Finding(
            "speedups.fused_cross_entropy", "the divergence from the whole model is one of whole logits; use auto or "
            "off",
        )  # fmt: skip
    if run.distillation is not None and elastic.full_model == "always":
        yield Finding(
            "elastic.full_model", "contradicts distillation, whose teacher would be computed for both; use sampled or "
            "alternate",
        )  # fmt: skip


def _beside_other_features(run: RunConfig) -> Iterator[Finding]:
    if run.elastic is None:
        return
    if run.grow is not None and run.grow.happens_in_training:
        yield Finding(
            _SHARES,
            "contradicts grow.at_step and grow.at_tokens: shares of the larger model would be other tokens than "
            "before. Grow first, by tools/ckpts/grow.py, and train the larger model elastic",
        )
    if run.speedups.torch_compile == "on":
        yield Finding(
            "speedups.torch_compile", "every share would compile every layer anew; use auto or off with elastic"
        )


def _reading(run: RunConfig) -> Iterator[Finding]:
    reading = run.reading
    if reading is None:
        return
    if reading.block > 1 and reading.top_k is None and reading.top_ks is None:
        yield Finding("reading.block", "needs param_token_top_k: the tokens that are chosen by blocks")
    for name in ("top_k", "top_ks"):
        value = getattr(reading, name)
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and count % reading.block:
                yield Finding(f"reading.{name}", f"{count} is no multiple of param_token_block {reading.block}")
    if run.evaluation.hf_model is not None:
        yield Finding("evaluation.hf_model", "is read by transformers, which takes param_token_share from its "
                      "config.json; leave the other param_token keys out")  # fmt: skip
    if reading.shares is not None and reading.top_ks is not None:
        yield Finding("reading.top_ks", "contradicts param_token_shares; token_curve.py measures one of them")


CHECKS: tuple[Check, ...] = (
    _has_tokens,
    _shares,
    _shares_are_whole,
    _groups_split,
    _distillation,
    _beside_other_features,
    _reading,
)
