"""What a method may refuse, and the reasons that several methods give; what of the test battery it may be exempt from."""

from collections.abc import Mapping
from typing import Literal

Refusable = Literal["robust", "privacy", "secure_aggregation", "micro_batch", "dmr", "pg", "averaging", "compensation"]
"""What a method may refuse: sections of a run file, train.micro_batch; the last four stand in [method]."""

WHOLE_BATCH: Mapping[Refusable, str] = {
    "micro_batch": "what it does in a step depends on a batch as a whole, so that smaller pieces are other work"
}
"""Why a method whose step is no sum over examples refuses micro-batches."""

OWN_FACTORS: Mapping[Refusable, str] = {
    **dict.fromkeys(
        ("robust", "privacy", "averaging"),
        "it needs each client's own factors, and no rule or noise on their mean is one on the updates'",
    ),
    "secure_aggregation": "it needs each client's own factors, which a sum of them does not tell",
}
"""Why a method that works on single clients' factors refuses them."""

USE_WEIGHS: Mapping[Refusable, str] = {
    "privacy": "it weighs each client by its own use of an expert, which noise on the clients' mean does not cover"
}
"""Why an activation-aware method refuses noise."""

OWN_WEIGHTS: Mapping[Refusable, str] = {"averaging": "it has a rule of averaging of its own"}
"""Why a method that is defined by how it averages refuses another rule."""

PROPERTIES: dict[str, str] = {
    "identical_clients": "clients that all return the same update leave exactly that update, whatever their weights",
    "lone_client": "one client of the largest budget, alone in a round, comes back as it was",
    "client_order": "the order in which replies arrive does not matter",
    "client_names": "what clients are called does not matter",
    "example_scale": "every number of examples times seven changes nothing",
    "client_halves": "a client weighs as much as two that return the same update from half its examples each",
    "untouched_expert": "an expert whose weights nobody changed stays bit for bit",
    "no_clients": "a round without replies leaves the state as it was",
    "predicted_bytes": "what is sent has exactly the bytes that costs predict; without this property, at most that many",
}
"""The properties of the test battery that a method may name in `Method.exempt`."""
