"""A tensor- and pipeline-parallel trainer for language models whose parameters are tokens."""
