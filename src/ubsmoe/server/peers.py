"""What an honest change is follows from a round's own updates: an update is dropped of which one tensor changed far more.

    size_t(c) = (root mean square, largest entry) of client c's change of tensor t        what was not sent down: from zero
    c is dropped if    size_t(c) > ratio median_t    for any t,    median_t over the positive sizes of the first clients

The median is over the tensor's own name where three or more of the first clients have moved it, else over its kind: `scale.4`, a
tensor of the clients of one K, is of the kind `scale`. With fewer than three sizes nobody is judged: of two clients nobody can tell
which one lies.

Root mean squares, because ranks differ between tiers; only what is too large, because who does little harms nobody; only peers of
the same round, because honest changes grow and shrink over a run (the first step from B = 0 leaves A where it was) and because a
resumed run then decides as a whole one. The first `WINDOW` updates of a round are held for it, the others pass one by one. Among
them fewer than half may lie. Under [privacy] nobody is judged by others: clipping bounds each alone there.

Ours; the median as the yardstick of an honest norm: Sun et al. 2019 (arXiv 1911.07963), section 4.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import median_low

import torch
from torch import Tensor

from ubsmoe.messages import Dropped, Tensors, Update
from ubsmoe.server.robust import Answer

WINDOW = 8
FEWEST = 3  # sizes that have a median
Sizes = Mapping[str, tuple[float, float]]


def without_outliers(
    answers: Iterable[Answer], ratio: float, drop: Callable[[Dropped, Answer], None]
) -> Iterator[Answer]:
    """The answers in their order, without those that changed a tensor far more than the median of the first ones did.

    Args:
        answers: valid ones, in client order.
        ratio: how many times the median is still honest.
        drop: hears of the others.
    """
    waiting = iter(answers)
    held = list(islice(waiting, WINDOW))
    sizes = [sizes_of(update, task.payload) for task, update in held]
    limits = limits_of(sizes, ratio)
    for own in sizes:
        yield from _judged(held.pop(0), own, limits, ratio, drop)
    for answer in waiting:
        yield from _judged(answer, sizes_of(answer[1], answer[0].payload), limits, ratio, drop)


def sizes_of(update: Update, sent: Tensors) -> Sizes:
    """Root mean square and largest entry of what a client changed, by tensor."""
    changed = {**update.adapters, **update.extras}
    return {name: _size(value, sent.get(name)) for name, value in changed.items() if value.is_floating_point()}


def _size(value: Tensor, before: Tensor | None) -> tuple[float, float]:
    change = value.detach() if before is None else value.detach() - before.to(value.device)
    if not change.numel():
        return 0.0, 0.0
    norm = torch.linalg.vector_norm(change, dtype=torch.float64)
    return float(norm) / change.numel() ** 0.5, float(torch.linalg.vector_norm(change, float("inf")))


def kind_of(name: str) -> str:
    """A tensor's name without its numbers.

    >>> kind_of("layers.3.up.A"), kind_of("scale.4")
    ('layers.up.A', 'scale')
    """
    return ".".join(part for part in name.split(".") if not part.isdigit())


def limits_of(clients: Sequence[Sizes], ratio: float) -> dict[str, tuple[float, float]]:
    """The largest size that counts, by tensor and by kind; where three or more of these clients have moved it."""
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for sizes in clients:
        for name, size in sizes.items():
            if size[0] > 0:
                for key in {name, kind_of(name)}:
                    seen[key].append(size)
    return {
        key: (ratio * median_low(rms for rms, _ in found), ratio * median_low(most for _, most in found))
        for key, found in seen.items()
        if len(found) >= FEWEST
    }


def _judged(
    answer: Answer, sizes: Sizes, limits: Mapping[str, tuple[float, float]], ratio: float,
    drop: Callable[[Dropped, Answer], None],
) -> Iterator[Answer]:  # fmt: skip
    reason = next(filter(None, (_too_large(name, size, limits, ratio) for name, size in sizes.items())), None)
    if reason is None:
        yield answer
    else:
        drop(Dropped(answer[1].client, answer[1].round, "robust", reason), answer)


def _too_large(
    name: str, size: tuple[float, float], limits: Mapping[str, tuple[float, float]], ratio: float
) -> str | None:
    limit = limits.get(name) or limits.get(kind_of(name))
    for what, own, most in zip(("root mean square", "largest entry"), size, limit or (), strict=False):
        if own > most:
            return (
                f"{name} changed by {own:.3g} ({what}), {own / most * ratio:.3g} times the median of the round's first "
                f"clients; at most {ratio:g} times counts (rounds.max_ratio)"
            )
    return None
