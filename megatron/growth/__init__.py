"""Operators that make a larger model of a trained one."""
