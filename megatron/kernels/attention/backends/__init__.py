"""Backends of causal attention, one module each."""
