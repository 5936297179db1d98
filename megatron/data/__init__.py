"""Tokenizers, dataset formats, the order of samples, loaders."""
