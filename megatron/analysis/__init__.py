"""Analysis of trained models: how much of its context each attention head uses."""
