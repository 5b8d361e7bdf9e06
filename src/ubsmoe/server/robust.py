"""Between the gate and the method: what [robust] does to a round's updates, each of which has passed every check.

Clipping works on one update at a time; the cap on use and multi-Krum need all of a round's. Trimmed mean and median are ways to
average, so methods get them as `Base.mean`. The formulas are in maths/robust.py.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from ubsmoe.config import RobustSettings
from ubsmoe.errors import RoundError
from ubsmoe.maths import robust
from ubsmoe.messages import Dropped, Tensors, Update
from ubsmoe.methods.method import State


def robustify(
    updates: Iterable[Update], state: State, settings: RobustSettings, drop: Callable[[Dropped], None]
) -> Iterator[Update]:
    """The updates as they may be averaged.

    Args:
        updates: sound ones, in client order.
        state: what the clients were sent.
        settings: [robust].
        drop: hears of those that multi-Krum leaves out.

    Raises:
        RoundError: if there are too few for the rule.
    """
    if settings.clip_norm is not None:
        updates = map(partial(clipped, state=state, longest=settings.clip_norm), updates)
    if settings.rule == "mean" and settings.utilization_cap is None:
        yield from updates  # nothing is held
        return
    held = list(updates)
    if len(held) < settings.fewest_clients:
        raise RoundError(
            f"robust.rule {settings.rule!r} against {settings.attackers} attackers needs {settings.fewest_clients} updates, "
            f"{len(held)} count; the checkpoint before is intact. Start again to go on if clients were merely away; "
            "else a new run with fewer robust.attackers or more clients a round"
        )
    if settings.utilization_cap is not None and held:
        held = _capped(held, settings.utilization_cap)
    if settings.rule == "multi_krum":
        held = _nearest(held, state, settings.attackers, drop)
    yield from held


def delta_of(update: Update, state: State) -> dict[str, torch.Tensor]:
    """What a client changed, float64, by name: its adapter, and the method's own tensors if it was sent them."""
    sent: Tensors = {**state.extras, **state.adapters}
    returned = {**update.extras, **update.adapters}
    return {name: value.double() - sent[name].double() for name, value in returned.items() if name in sent}


def clipped(update: Update, state: State, longest: float) -> Update:
    """The update with a change of at most this norm over all its tensors; the same object if it is no longer."""
    change = delta_of(update, state)
    factor = robust.clip_factor(robust.squared_norm(change) ** 0.5, longest)
    if factor == 1:
        return update
    return with_delta(update, state, {name: factor * value for name, value in change.items()})


def with_delta(update: Update, state: State, change: Tensors) -> Update:
    """The update as it would be had the client changed what it was sent by `change`."""

    def of(sent: Tensors, returned: Tensors) -> dict[str, torch.Tensor]:
        return {
            name: (sent[name].double() + change[name]).to(value.dtype) if name in change else value
            for name, value in returned.items()
        }

    return replace(update, adapters=of(state.adapters, update.adapters), extras=of(state.extras, update.extras))


def _capped(updates: Sequence[Update], cap: float) -> list[Update]:
    counts = torch.stack([update.expert_tokens for update in updates])
    capped = robust.capped_counts(counts, torch.tensor([update.assignments for update in updates]), cap)
    return [replace(update, expert_tokens=own) for update, own in zip(updates, capped, strict=True)]


def _nearest(updates: Sequence[Update], state: State, attackers: int, drop: Callable[[Dropped], None]) -> list[Update]:
    changes = [delta_of(update, state) for update in updates]
    common = set.intersection(*(set(change) for change in changes))  # FLAME's scales have the name of their K
    distances = robust.squared_distances([{n: c for n, c in change.items() if n in common} for change in changes])
    kept = set(robust.multi_krum(distances, attackers))
    for number, update in enumerate(updates):
        if number not in kept:
            reason = f"among the {attackers} that lie farthest from the others (robust.rule multi_krum)"
            drop(Dropped(update.client, update.round, "robust", reason))
    return [update for number, update in enumerate(updates) if number in kept]
