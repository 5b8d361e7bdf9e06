"""What crosses the wire as bytes, and the gate that trusts none of it."""
