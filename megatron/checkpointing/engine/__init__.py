"""Saving and loading through DeepSpeed's engine."""
