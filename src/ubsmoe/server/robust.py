"""[robust]: what happens to a round's updates between validation and aggregation.

Clipping works on one update at a time; the cap on use and multi-Krum need all of a round's. Trimmed mean and median are ways to
average: methods/averaging.py chooses them, and methods get them as `RunShape.mean`. The formulas are in maths/robust.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import median_low

import torch

from ubsmoe.config import RobustSettings
from ubsmoe.errors import RoundError
from ubsmoe.maths import robust
from ubsmoe.messages import Dropped, Profile, Task, Tensors, Update
from ubsmoe.methods.method import Contribution, contribution
from ubsmoe.methods.sums import delta_of, with_delta

Answer = tuple[Task, Update]
"""A task and the valid update that answers it."""


def most_examples(clients: Sequence[Profile], max_weight: float) -> float:
    """How many examples a client may count for: a multiple of the median that these clients announced.

    >>> most_examples([Profile("a", 0, 1.0, 2, 8, 100), Profile("b", 0, 1.0, 2, 8, 2**52)], max_weight=10)
    1000.0
    """
    return float(max_weight * median_low(client.num_examples for client in clients)) if clients else math.inf


def robustify(
    answers: Iterable[Answer],
    settings: RobustSettings,
    drop: Callable[[Dropped], None],
    most_examples: float = math.inf,
) -> Iterator[Contribution]:
    """The updates as they may be averaged.

    Args:
        answers: valid ones, in client order.
        settings: [robust].
        drop: hears of those that multi-Krum leaves out.
        most_examples: that a client may count for.

    Raises:
        RoundError: if there are too few for the rule.
    """
    if settings.clip_norm is not None:
        longest = settings.clip_norm
        answers = ((task, clipped(update, task.payload, longest)) for task, update in answers)
    if settings.rule == "mean" and settings.utilization_cap is None:
        yield from (contribution(update, most_examples) for _, update in answers)  # one in memory at a time
        return
    held = list(answers)
    if len(held) < settings.fewest_clients:
        raise RoundError(
            f"robust.rule {settings.rule!r} against {settings.attackers} attackers needs {settings.fewest_clients} updates, "
            f"{len(held)} count; the checkpoint before is intact. Start again to go on if clients were merely away; "
            "else a new run with fewer robust.attackers or more clients a round"
        )
    contributions = [contribution(update, most_examples) for _, update in held]
    if settings.utilization_cap is not None and held:
        contributions = _capped(contributions, settings.utilization_cap)
    kept: Sequence[int] = range(len(held))
    if settings.rule == "multi_krum":
        kept = _nearest(held, settings.attackers)
        for _, update in (answer for number, answer in enumerate(held) if number not in kept):
            reason = f"among the {settings.attackers} that lie farthest from the others (robust.rule multi_krum)"
            drop(Dropped(update.client, update.round, "robust", reason))
    yield from (contributions[number] for number in kept)


def clipped(update: Update, sent: Tensors, longest: float) -> Update:
    """The update with a change of at most this norm over all its tensors; the same object if it is no longer."""
    delta = delta_of(update, sent)
    factor = robust.clip_factor(robust.squared_norm(delta) ** 0.5, longest)
    if factor == 1:
        return update
    delta = {name: factor * value for name, value in delta.items()}
    return replace(
        update,
        adapters=with_delta(update.adapters, sent, delta),
        extras=with_delta(update.extras, sent, delta),
    )


def _capped(contributions: Sequence[Contribution], cap: float) -> list[Contribution]:
    """Each client's shares within a factor `cap` of the clients' median; rows then no longer sum to the assignments."""
    shares = robust.capped_shares(torch.stack([one.shares for one in contributions]), cap)
    return [replace(one, expert_tokens=own * one.assignments) for one, own in zip(contributions, shares, strict=True)]


def _nearest(answers: Sequence[Answer], attackers: int) -> list[int]:
    """Which answers multi-Krum keeps, by position."""
    deltas = [delta_of(update, task.payload) for task, update in answers]
    common = set.intersection(*(set(delta) for delta in deltas))  # FLAME's scales have the name of their K
    distances = robust.squared_distances([{n: value for n, value in delta.items() if n in common} for delta in deltas])
    return robust.multi_krum(distances, attackers)
