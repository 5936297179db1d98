"""Inputs, labels and loss mask."""

import torch

from megatron.data.micro_batch import to_inputs_and_labels

TOKENS = torch.tensor([[5, 0, 7, 8], [0, 0, 2, 0]])


def test_labels_are_inputs_shifted_by_one() -> None:
    inputs, (labels, mask) = to_inputs_and_labels(TOKENS, eod_token=None)
    assert inputs.tolist() == [[5, 0, 7], [0, 0, 2]]
    assert labels.tolist() == [[0, 7, 8], [0, 2, 0]]
    assert mask.dtype == torch.float32
    assert mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert inputs.is_contiguous()
    assert labels.is_contiguous()


def test_end_of_document_inputs_do_not_count() -> None:
    """NeoX masks where the input is the token, not where the label is."""
    _, (_, mask) = to_inputs_and_labels(TOKENS, eod_token=0)
    assert mask.tolist() == [[1, 0, 1], [0, 0, 1]]


def test_masked_labels_do_not_count() -> None:
    given = torch.tensor([[-100, -100, 7, -100], [0, 9, -100, 0]])
    inputs, (labels, mask) = to_inputs_and_labels(torch.stack([TOKENS, given], dim=1), eod_token=None)
    assert inputs.tolist() == [[5, 0, 7], [0, 0, 2]]
    assert labels.tolist() == [[0, 7, 8], [9, 2, 0]]
    assert mask.tolist() == [[0, 1, 0], [1, 0, 1]]
    _, (_, both) = to_inputs_and_labels(torch.stack([TOKENS, given], dim=1), eod_token=0)
    assert both.tolist() == [[0, 0, 0], [0, 0, 1]]
