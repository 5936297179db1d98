"""Backends of Pattention, one module each."""
