"""A task and an honest answer to it, small enough to work by hand: two layers, five experts, K = 2."""

import torch

from ubsmoe.messages import Profile, Step, Task, Update

PROFILE = Profile("client-3", tier=1, budget=0.5, top_k=2, rank=3, num_examples=7)
PAYLOAD = {"layers.0.up.A": torch.linspace(-1, 1, 60).reshape(5, 3, 4), "phi": torch.linspace(0, 1, 10).reshape(2, 5)}
TASK = Task(4, PROFILE, PAYLOAD, run="run-1", base="f00d")
COUNTS = torch.tensor([[3, 3, 0, 0, 0], [1, 1, 1, 1, 2]])
UPDATE = Update(
    client="client-3",
    round=4,
    num_examples=7,
    adapters={"layers.0.up.A": PAYLOAD["layers.0.up.A"] + 0.25},
    expert_tokens=COUNTS,
    tokens=3,
    assignments=6,
    loss=1.5,
    seconds=0.1,
    extras={"phi": PAYLOAD["phi"], "rank": torch.tensor(3)},
    tier=1,
    run="run-1",
    base="f00d",
    steps=(Step(1, 2.0, 0.01, 0.5), Step(4, 1.0, 0.005, 3.0)),
)
