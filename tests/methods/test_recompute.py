"""Gradient checkpointing changes no bit of what a client returns, whatever its method does on the side of a forward pass."""

from dataclasses import replace

import pytest
import torch

from ubsmoe.client.train import Trainer, train
from ubsmoe.config import TierSettings, TrainSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.messages import Task
from ubsmoe.methods import METHODS, build
from ubsmoe.model.recompute import recomputing

SETTINGS = TrainSettings(local_steps=2, batch_size=2, gradient_accumulation=2, learning_rate=1e-2)
EXAMPLES = [Tokens(tuple(2 + (7 * i + j) % 30 for j in range(4 + i % 3)), prompt_length=2) for i in range(9)]
LOW = 1
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("ubsmoe", {"pg": False}),
    *(("ubsmoe", {"pg": {"mode": mode}}) for mode in ("self_ipw", "sampled", "oracle")),
    ("ubsmoe", {"dmr": {"phi": "trained"}, "pg": {"mode": "sampled", "scope": ["experts", "router", "hidden"]}}),
    ("hetlora", {"pg": True}),
    ("flame", {"dmr": True}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_a_client_that_recomputes_returns_the_same_bits(lab, name, settings):
    method = build(name, lab.shape, settings)
    state, profile = lab.warm(method), lab.profile(method, LOW, "client-1")
    task = Task(1, profile, method.dispatch(state, profile))
    plain, again = (
        train(Trainer(lab.model, method, how, TierSettings(), seed=0, pad_id=0), task, EXAMPLES)
        for how in (SETTINGS, SETTINGS.model_copy(update={"gradient_checkpointing": True}))
    )
    for part in ("adapters", "extras"):
        ours, theirs = getattr(plain, part), getattr(again, part)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.equal(value, task.payload.get(key, value)) for key, value in again.adapters.items())
    assert torch.equal(plain.expert_tokens, again.expert_tokens)
    strip = {"adapters": {}, "extras": {}, "expert_tokens": plain.expert_tokens, "seconds": 0.0}
    assert replace(plain, **strip) == replace(again, **strip)


def test_a_forward_pass_keeps_less(lab, model, install):
    install(build("fedavg", lab.shape))
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    sizes, ids = [], torch.arange(2, 30).repeat(3, 1)
    for recompute in (False, True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            if recompute:
                with recomputing(model):
                    model.model(ids, use_cache=False)
            else:
                model.model(ids, use_cache=False)
        sizes.append(sum(kept))
    inputs = 4 * len(model.layers) * ids.numel() * model.model.config.hidden_size  # torch keeps them out of sight
    assert sizes[1] + inputs < 0.4 * sizes[0] and sizes[2] == sizes[0]
