"""Adapters and whole models in formats that others load, and back."""
