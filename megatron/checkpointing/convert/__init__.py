"""Functions from one checkpoint to another."""
