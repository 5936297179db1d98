"""Blends are NeoX's greedy order, exactly, ties included."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.order.blendable_dataset import BlendableDataset, blend_order
from megatron.data.order.gpt_dataset import GPTDataset


def blend_naively(weights: list[float], num_items: int) -> list[tuple[int, int]]:
    """(dataset, item of it) by the rule, one item at a time in double precision."""
    counts = [0] * len(weights)
    order = []
    for item in range(num_items):
        deficits = [weight * float(max(item, 1)) - float(count) for weight, count in zip(weights, counts, strict=True)]
        choice = deficits.index(max(deficits))
        order.append((choice, counts[choice]))
        counts[choice] += 1
    return order


def normalized(weights: list[float]) -> npt.NDArray[np.float64]:
    array = np.array(weights, dtype=np.float64)
    return array / array.sum()


weight_lists = st.one_of(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6),
    st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0]), min_size=1, max_size=8),
    st.lists(st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0]), min_size=2, max_size=5).filter(any),
)


@given(weights=weight_lists, num_items=st.integers(1, 3000), blocks=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_equals_the_naive_loop(weights: list[float], num_items: int, blocks: int) -> None:
    shares = normalized(weights)
    order = blend_order(shares, num_items, min_block_length=1 + num_items // blocks)
    assert [order[item] for item in range(num_items)] == blend_naively(shares.tolist(), num_items)


@pytest.mark.parametrize(
    "weights",
    [
        [1.0, 1.0],
        [3.0, 2.0, 1.0],
        [1.0] * 10,
        [0.9, 0.09, 0.009, 0.001],
        [1.0, 1e-4, 1e-6, 0.3],
        [0.5**n for n in range(12)],
    ],
    ids=str,
)
def test_long_blends_equal_the_naive_loop(weights: list[float]) -> None:
    shares = normalized(weights)
    order = blend_order(shares, 30_000)
    naive = blend_naively(shares.tolist(), 30_000)
    assert order.choices.tolist() == [choice for choice, _ in naive]
    sampled = range(0, 30_000, 97)
    assert [order[item] for item in sampled] == [naive[item] for item in sampled]


class Counter(GPTDataset):
    """A part whose items are its own number and the item's, wrapping as GPTDataset does."""

    def __init__(self, number: int, length: int) -> None:
        self.number = number
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> npt.NDArray[np.int64]:
        return np.array([self.number, item])


def test_length_is_the_sum_and_parts_are_read_past_their_end() -> None:
    blend = BlendableDataset([Counter(0, 10), Counter(1, 90)], [3.0, 1.0])
    assert len(blend) == 100
    items = [blend[item].tolist() for item in range(100)]
    assert items == [list(pair) for pair in blend_naively([0.75, 0.25], 100)]
    assert max(item for number, item in items if number == 0) == 74
    np.testing.assert_array_equal(blend[237], blend[37])
