"""Backends of layer normalization, one module each."""
