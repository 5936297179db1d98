"""Gradients on the wire while ranks compute: what is sent, when, and that no number of a step depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import yaml

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize
from megatron.mpu.collective_trace import traced_collectives
from megatron.mpu.communication_tally import CommunicationTally, kind_of_ranks
from megatron.mpu.context import ParallelContext
from megatron.training.build_engine import build_engine
from megatron.training.gradients.buckets import Bucket
from megatron.training.gradients.reduction import GradientReduction
from megatron.training.gradients.weight_gathering import WeightGathering
from megatron.training.stop_request import StopRequest
from tests.helpers.configs import SEQ_LENGTH, TOKENFORMER, VOCAB_SIZE, layout_keys
from tests.helpers.distributed import run_on_new_ranks

WIDTH, LAYERS = TOKENFORMER["hidden_size"], TOKENFORMER["num_layers"]
EMBEDDING = VOCAB_SIZE * WIDTH
WHOLE = EMBEDDING + LAYERS * WIDTH * 2 * (3 * 24 + 40 + 48) + 2 * WIDTH
UNUSED, UNUSED_SIZE = "layers.1.mlp.key_tokens", 48 * WIDTH
DATA, STAGES = layout_keys(data=2, accumulation=2), layout_keys(pipe=2, accumulation=2)
BF16 = {"precision": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "fp32": DATA,
    "one bucket": DATA | {"zero_optimization": {"reduce_bucket_size": 500_000_000}},
    "bf16": DATA | BF16,
    "bf16 on the wire": DATA | {"communication_data_type": "bf16"},
    "recomputed": DATA | {"checkpoint_activations": True},
    "muon": DATA | {"optimizer": TOKENFORMER["optimizer"] | {"type": "Muon"}},
    "unused": DATA,
    "stages": STAGES,
    "stages, one bucket": STAGES | {"zero_optimization": {"reduce_bucket_size": 500_000_000}},
}
"""Changes of a tiny TokenFormer whose buckets have at most 2000 elements, several for each layer."""


@dataclass
class Seen:
    """Observations of one rank, in its second step unless said otherwise."""

    events: list[str] = field(default_factory=list)
    """Names of parameters whose gradients come, "sent" for a bucket, and "end" of the last backward pass."""
    rows: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    """Calls and bytes by operation and by the ranks that take part."""
    own: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Gradients before they are sent, by group and place."""
    slices: list[torch.Tensor] = field(default_factory=list)
    """This rank's part of the means."""
    norms: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Buckets of weights on their way in a fourth step: as each layer runs, after it, and once layers are read."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def watch(self, bucket: Bucket, reduction: GradientReduction) -> None:
        self.events.append("sent")
        self.own[bucket.group, bucket.place.start] = reduction._elements(bucket).clone()

    def own_of(self, group: int) -> torch.Tensor:
        """Returns a group's flat gradient before it is sent."""
        return torch.cat([self.own[key] for key in sorted(self.own) if key[0] == group])


def observe(folder: Path) -> dict[str, Seen]:
    """Takes two steps of each case on this rank."""
    deepspeed.init_distributed("gloo", verbose=False)
    with traced_collectives() as trace:
        return {case: observe_case(case, folder / f"{number}.yml", trace) for number, case in enumerate(CASES)}


def observe_case(case: str, config: Path, trace: Any) -> Seen:
    loaded = load_config([config])
    batch, parallel = loaded.batch(dist.get_world_size()), loaded.run.parallel
    context = ParallelContext.create(parallel.model_parallel_size, parallel.pipe_parallel_size)
    built = build_engine(loaded.run, batch, VocabSize(VOCAB_SIZE, VOCAB_SIZE), context, StopRequest())
    engine = built.engine
    parameters = dict(engine.module.global_parameters())
    generator = torch.Generator().manual_seed(context.data_rank)

    def batches() -> Iterator[Any]:
        while True:
            tokens = torch.randint(VOCAB_SIZE, (batch.micro_batch_size, SEQ_LENGTH + 1), generator=generator)
            yield tokens[:, :-1], (tokens[:, 1:].contiguous(), torch.ones(batch.micro_batch_size, SEQ_LENGTH))

    seen = Seen()
    own_send, own_end, own_finish = (getattr(GradientReduction, name) for name in ("_send", "end_backward", "finish"))

    def send(reduction: GradientReduction, bucket: Bucket) -> None:
        seen.watch(bucket, reduction)
        own_send(reduction, bucket)

    def end_backward(reduction: GradientReduction) -> Any:
        seen.events.append("end")
        return own_end(reduction)

    def finish(reduction: GradientReduction) -> None:
        own_finish(reduction)
        seen.slices = [mean.clone() for mean in reduction.slices]

    micro_batches = batches()
    engine.train_batch(micro_batches)
    seen.norms.append(float(engine.get_global_grad_norm()))
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.events.append(name))
        for name, parameter in parameters.items()
    ]
    if case == "unused":
        parameters[UNUSED].requires_grad_(False)
    trace.tally = CommunicationTally()
    with (
        mock.patch.object(GradientReduction, "_send", send),
        mock.patch.object(GradientReduction, "end_backward", end_backward),
        mock.patch.object(GradientReduction, "finish", finish),
        trace.tally.step(),
    ):
        engine.train_batch(micro_batches)
    for (operation, channel), row in trace.tally.rows.items():
        ranks = trace.channels[channel].ranks
        if len(set(ranks)) > 1:
            key = operation, kind_of_ranks(ranks, context)
            calls, num_bytes = seen.rows.get(key, (0, 0))
            seen.rows[key] = calls + row.calls, num_bytes + row.num_bytes
    seen.norms.append(float(engine.get_global_grad_norm()))
    for hook in hooks:
        hook.remove()
    own_wait = WeightGathering.wait_for

    def wait_for(weights: WeightGathering, layer: int) -> None:
        own_wait(weights, layer)
        seen.pending.append(pending(weights))

    with built.weights.overlapping():
        engine.train_batch(micro_batches)
        with mock.patch.object(WeightGathering, "wait_for", wait_for):
            engine.train_batch(micro_batches)
        seen.pending.append(pending(built.weights))
        engine.module.body()
        seen.pending.append(pending(built.weights))
    seen.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return seen


def pending(weights: WeightGathering) -> int:
    """Counts the buckets that nobody has waited for yet."""
    return len(weights._works) - weights._arrived


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    """Observes both ranks."""
    folder = tmp_path_factory.mktemp("reduction")
    for number, changes in enumerate(CASES.values()):
        settings = TOKENFORMER | {"zero_optimization": {"reduce_bucket_size": 2000}} | changes
        (folder / f"{number}.yml").write_text(yaml.safe_dump(settings))
    return run_on_new_ranks(observe, 2, folder)


def test_a_gradient_is_sent_once_in_the_format_of_the_wire(ranks: list[dict[str, Seen]]) -> None:
    """Where an all-reduce sent each twice as far, after the backward pass."""
    for rank in ranks:
        for case, width in {"fp32": 4, "one bucket": 4, "bf16": 4, "bf16 on the wire": 2, "muon": 4}.items():
            rows = rank[case].rows
            calls, num_bytes = rows["reduce", "data-parallel ranks"]
            assert num_bytes == width * WHOLE, case
            # Two groups of two parts each; the embedding alone is eight times a small bucket.
            assert calls == 4 if case == "one bucket" else calls > 20
            # Verdict, norm and loss.
            assert rows["all_reduce", "data-parallel ranks"][1] < 100
        rows = rank["stages"].rows
        assert ("reduce", "data-parallel ranks") not in rows
        assert 0 <= rows["all_reduce", "pipeline stages"][1] - 4 * EMBEDDING < 100, "tied gradients, verdict, norm"


@pytest.mark.parametrize("case", ["fp32", "bf16", "recomputed", "muon"])
def test_gradients_are_sent_while_the_last_backward_pass_goes_on(case: str, ranks: list[dict[str, Seen]]) -> None:
    for rank in ranks:
        events = rank[case].events
        names = [event for event in events if event not in ("sent", "end")]
        parameters = len(rank[case].weights)
        assert sorted(names) == sorted(2 * list(rank[case].weights)), "each once in each of two backward passes"
        first_pass = events[:parameters]
        assert "sent" not in first_pass, "sums of all micro batches, not of one"
        on_the_way = events[events.index("sent") : events.index("end")]
        assert any(name.startswith("layers.0.") for name in on_the_way), "while the first layer is still computed"
        assert "sent" not in events[events.index("end") :], "nothing is left for later"


def test_a_slice_has_the_mean_in_the_format_of_the_wire(ranks: list[dict[str, Seen]]) -> None:
    for case in ("fp32", "bf16", "bf16 on the wire"):
        for group in range(2):
            first, second = (rank[case].own_of(group) for rank in ranks)
            assert not torch.equal(first, second)
            if case == "bf16 on the wire":
                want = (first.bfloat16() + second.bfloat16()).float() / 2
            else:
                want = ((first.double() + second.double()) / 2).float()
            got = torch.cat([rank[case].slices[group] for rank in ranks])
            assert torch.equal(got[: len(want)], want), case
            assert not got[len(want) :].any(), "padding"


def test_the_size_of_buckets_changes_no_bit(ranks: list[dict[str, Seen]]) -> None:
    for rank in ranks:
        for small, whole in (("fp32", "one bucket"), ("stages", "stages, one bucket")):
            assert rank[small].norms == rank[whole].norms
            assert all(torch.equal(rank[small].weights[n], rank[whole].weights[n]) for n in rank[whole].weights)


def test_weights_arrive_while_the_next_step_goes_on(ranks: list[dict[str, Seen]]) -> None:
    for case in ("fp32", "bf16", "recomputed", "muon"):
        for rank in ranks:
            *layers, after, read = rank[case].pending
            first_pass = layers[: len(layers) // 2]
            assert first_pass[0] > 0, "the embedding runs before the others are there"
            assert first_pass == sorted(first_pass, reverse=True) and first_pass[-1] == 0
            assert not any(layers[len(layers) // 2 :])
            assert after > 0 and read == 0
        assert all(torch.equal(ranks[0][case].weights[n], ranks[1][case].weights[n]) for n in ranks[0][case].weights)
    assert not any(ranks[0]["stages"].pending), "one data-parallel rank sends nothing"


def test_a_parameter_that_no_micro_batch_reads_has_a_gradient_of_zero(ranks: list[dict[str, Seen]]) -> None:
    """Not that of the step before, which lies in the flat tensor."""
    used, unused = (
        sum(int(part.count_nonzero()) for rank in ranks for part in rank[case].slices) for case in ("fp32", "unused")
    )
    assert used - unused == pytest.approx(UNUSED_SIZE, rel=0.05)
    for rank in ranks:
        assert UNUSED not in rank["unused"].events[rank["unused"].events.index("sent") :]
        assert rank["unused"].norms[0] == rank["fp32"].norms[0]
        assert rank["unused"].norms[1] < rank["fp32"].norms[1]
