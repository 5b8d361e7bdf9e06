"""Where examples come from, how they are split among clients, and how they become tokens."""
