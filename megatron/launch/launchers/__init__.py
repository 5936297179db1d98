"""Launchers, one module each."""
