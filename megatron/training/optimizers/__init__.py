"""Optimizers that no library has in the form that ZeRO needs, one module each."""
