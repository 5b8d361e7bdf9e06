"""Research tools: comparisons, and experiments on kept states and on small problems."""
