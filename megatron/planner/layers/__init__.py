"""Costs of a layer of each architecture, one module each."""
