"""Growth operators, one module each."""
