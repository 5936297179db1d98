"""Durable and atomic writing, hashing, progress messages."""
