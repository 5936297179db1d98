"""Tables of NeoX's keys, by theme."""
