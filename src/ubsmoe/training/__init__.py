"""A run from its settings to its result: what `ubsmoe run` and Python have in common."""
