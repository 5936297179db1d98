"""Smaller models of a trained one: shares of its parameter tokens, and the most important of them."""
