"""The layer of each architecture, one module each."""
