"""Buckets of flat gradients: every element once, with one owner, in the order of the backward pass."""

from __future__ import annotations

import random

import pytest

from megatron.training.gradients.buckets import LARGEST, Bucket, Member, plan_buckets


def random_groups(seed: int, ranks: int) -> tuple[list[list[Member]], list[int]]:
    """Draws two optimizer groups of a model whose first weight is tied, and the sizes of a rank's parts."""
    draw = random.Random(seed)
    members = [Member(order, draw.choice([1, 7, 30, 200]), is_tied=order == 0) for order in range(draw.randint(4, 20))]
    groups = [members[::2], members[1::2]]
    return groups, [-(-sum(member.size for member in group) // (2 * ranks)) * 2 for group in groups]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("largest", [16, 100, 10**9])
@pytest.mark.parametrize("seed", range(5))
def test_buckets_hold_every_element_once_with_the_rank_that_steps_it(seed: int, largest: int, ranks: int) -> None:
    groups, part_sizes = random_groups(seed, ranks)
    buckets = plan_buckets(groups, part_sizes, largest)
    for number, (members, part_size) in enumerate(zip(groups, part_sizes, strict=True)):
        own = sorted((bucket for bucket in buckets if bucket.group == number), key=lambda each: each.place.start)
        assert own[0].place.start == 0
        assert [each.place.start for each in own[1:]] == [each.place.stop for each in own[:-1]]
        assert own[-1].place.stop == sum(member.size for member in members), "padding is in no bucket"
        for bucket in own:
            assert 0 < bucket.size <= largest
            assert bucket.owner == bucket.place.start // part_size == (bucket.place.stop - 1) // part_size
            assert bucket.members == tuple(overlapping(members, bucket))
            assert {members[member].is_tied for member in bucket.members} == {bucket.is_tied}


def overlapping(members: list[Member], bucket: Bucket) -> list[int]:
    starts = [sum(member.size for member in members[:number]) for number in range(len(members))]
    return [
        number
        for number, (start, member) in enumerate(zip(starts, members, strict=True))
        if start < bucket.place.stop and start + member.size > bucket.place.start
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_follows_those_that_the_backward_pass_completes_before_it(seed: int) -> None:
    groups, part_sizes = random_groups(seed, 2)
    buckets = plan_buckets(groups, part_sizes, 50)
    completed = [min(groups[bucket.group][member].order for member in bucket.members) for bucket in buckets]
    untied = [order for order, bucket in zip(completed, buckets, strict=True) if not bucket.is_tied]
    assert untied == sorted(untied, reverse=True)
    assert [bucket.is_tied for bucket in buckets] == sorted(bucket.is_tied for bucket in buckets), "tied weights last"


def test_a_bucket_is_never_as_large_as_a_model() -> None:
    """The published configurations ask for 500 million elements, more than most of their models have."""
    members = [Member(order, 2**22) for order in range(36)]
    buckets = plan_buckets([members], [18 * 2**22], 500_000_000)
    assert len(buckets) == 18
    assert all(bucket.size == LARGEST for bucket in buckets)
