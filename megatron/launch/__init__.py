"""Launchers' environments; starting and watching ranks."""
