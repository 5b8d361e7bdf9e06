"""Estimates before a run starts: per tier and for the whole run."""
