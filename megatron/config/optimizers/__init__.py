"""Facts of each optimizer, one module each."""
