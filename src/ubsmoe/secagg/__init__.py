"""Secure aggregation after SecAgg+: clients mask their vectors so that only the sum of a round can be unmasked."""

from ubsmoe.errors import require

require("cryptography", "secagg")
