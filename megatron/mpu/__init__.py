"""Parallel context, collectives, split layers, process groups."""
