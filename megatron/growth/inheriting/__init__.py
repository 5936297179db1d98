"""Smaller models made of a trained one: its layers, chosen, stacked or cut to half their width."""
