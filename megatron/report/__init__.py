"""Records of runs and their curves, and a report of them in HTML."""
