"""Scores of checkpoints on tasks of lm-eval."""
