"""Needs of a run, known before it starts: memory, time and disk, and the layouts that fit."""
