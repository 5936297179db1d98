"""YAML files whose values remember their lines."""
