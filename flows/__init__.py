"""Prefect's face of the mover: parameters in, one call of the engine, state out. No byte is handled here."""
