"""Thetas in Triton, one module each, called as in `thetas/`."""
