"""Imports of GPT-NeoX's checkpoints and of published TokenFormer weights."""
