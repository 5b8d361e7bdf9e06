"""A finished run, opened again: scored, exported, served."""
