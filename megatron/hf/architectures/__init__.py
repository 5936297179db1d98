"""Each architecture's counterpart in transformers, one module each."""
