"""What a run will need before it starts: memory, time and disk, and the layouts that fit."""
