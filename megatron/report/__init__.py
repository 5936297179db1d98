"""What a run has left in its folder, read and shown: curves, and a report in HTML."""
