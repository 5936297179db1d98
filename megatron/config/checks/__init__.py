"""Checks across values, one function each, by section; they need no hardware and no optional package."""
