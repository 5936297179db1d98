"""Assembly, loop, callbacks, optimizer, stability."""
