"""The server's side of a run: rounds, validation, aggregation, evaluation."""
