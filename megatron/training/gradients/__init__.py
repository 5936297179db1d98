"""Gradients of a step: accumulated in flat tensors, summed over data-parallel ranks while the backward pass runs."""
