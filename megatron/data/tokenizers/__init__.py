"""Tokenizers, one module for each library."""
