"""What crosses the wire, as bytes."""
