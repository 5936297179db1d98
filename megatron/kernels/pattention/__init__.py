"""Pattention: attention from input tokens to parameter tokens."""
