"""Facts of each architecture, one module each."""
