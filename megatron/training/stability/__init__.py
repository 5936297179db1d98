"""Steps that are not finite, and patches of DeepSpeed."""
