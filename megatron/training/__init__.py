"""Assembly of a run, loop, callbacks, optimizer, learning rate, stability."""
