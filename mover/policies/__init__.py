"""Decisions without bytes: packing, names, limits, space, retries, recall."""
