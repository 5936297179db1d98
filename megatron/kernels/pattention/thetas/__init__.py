"""Normalizations of Pattention scores, one module each."""
