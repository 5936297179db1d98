"""Backends of rotary position embedding, one module each."""
