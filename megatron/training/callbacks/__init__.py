"""Things that happen around the steps: evaluation, metrics, checkpoints, batch hashes."""
