"""Formats of tokenized datasets, one module each."""
