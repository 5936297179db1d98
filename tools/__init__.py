"""Commands beside training, generation and evaluation: data, checkpoints, plots, benchmarks, checks of this code."""
