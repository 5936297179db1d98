"""Steps that are not finite, and what DeepSpeed gets wrong."""
