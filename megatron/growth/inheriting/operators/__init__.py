"""Ways to make a model of the layers of a larger one, one module each."""
