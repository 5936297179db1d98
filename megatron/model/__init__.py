"""Layers, architectures, the pipeline, the loss."""
