"""Checkpoints: on disk, as streams of layers, through the engine, from one form to another."""
