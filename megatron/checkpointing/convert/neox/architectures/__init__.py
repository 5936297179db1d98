"""Names of each architecture's parameters in NeoX's checkpoints, one module each."""
