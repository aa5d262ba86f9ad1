"""Measurements of the mover: memory, rate, and other people's programs on the same server for comparison."""
