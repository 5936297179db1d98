"""Sections, the NeoX vocabulary, checks, sizes of a model: everything that needs no torch."""
