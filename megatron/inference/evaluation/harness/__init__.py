"""A model of ours as lm-eval's harness sees it."""
