"""Sections of the configuration; a key is declared here, once."""
