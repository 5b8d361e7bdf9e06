"""What an honest change is follows from a round's own updates: an update is dropped of which one tensor changed far more.

    size_t(c) = (root mean square, largest entry) of client c's change of tensor t        what was not sent down: from zero
    c is dropped if    size_t(c) > ratio max(median_t, median_all)    for any t;    median_t over the positive sizes of t

Medians are over the round's first clients; `all` is the adapter as a whole, so that a tensor that hardly moves, as A does under SGD
while B is near 0, may move as much as the others do. An extra has only its own median: over its name where three or more of the
first clients have moved it, else over its kind (`scale.4`, of the clients of one K, is of the kind `scale`). With fewer than three
sizes nobody is judged: of two clients nobody can tell which one lies.

Root mean squares, because ranks differ between tiers; only what is too large, because who does little harms nobody; only peers of
the same round, because honest changes grow and shrink over a run (the first step from B = 0 leaves A where it was) and because a
resumed run then decides as a whole one. The first `WINDOW` updates of a round are held for it, the others pass one by one. Among
them fewer than half may lie. Under [privacy] nobody is judged by others: clipping bounds each alone there.

Ours; the median as the yardstick of an honest norm: Sun et al. 2019 (arXiv 1911.07963), section 4.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from statistics import median_low

import torch
from torch import Tensor

from ubsmoe.messages import Dropped, Tensors, Update
from ubsmoe.server.robust import Answer

WINDOW = 8
FEWEST = 3  # sizes that have a median
ALL = "the adapter as a whole"
Size = tuple[float, float]
Sizes = Mapping[str, Size]
Judged = Callable[[Tensors], Tensors]


def without_outliers(
    answers: Iterable[Answer], ratio: float, drop: Callable[[Dropped, Answer], None], judged: Judged
) -> Iterator[Answer]:
    """The answers in their order, without those that changed a tensor far more than the median of the first ones did.

    Args:
        answers: valid ones, in client order.
        ratio: how many times the median is still honest.
        drop: hears of the others.
        judged: the method's; what of extras is compared.
    """
    waiting = iter(answers)
    held = list(islice(waiting, WINDOW))
    first = [sizes_of(update, task.payload, judged) for task, update in held]
    limits = Limits(first, ratio)
    sized = ((held.pop(0), sizes) for sizes in first)
    rest = ((answer, sizes_of(answer[1], answer[0].payload, judged)) for answer in waiting)
    for answer, sizes in chain(sized, rest):
        if fault := limits.fault(sizes):
            drop(Dropped(answer[1].client, answer[1].round, "robust", fault), answer)
        else:
            yield answer


def sizes_of(update: Update, sent: Tensors, judged: Judged) -> dict[str, Size]:
    """Root mean square and largest entry of what a client changed, by tensor, and of the adapter as a whole under `ALL`."""
    adapters = {name: _moved(value, sent.get(name)) for name, value in update.adapters.items()}
    extras = {name: _moved(value, sent.get(name)) for name, value in judged(update.extras).items()}
    whole = tuple(map(sum, zip(*((square, count) for square, count, _ in adapters.values()), strict=True))) or (0.0, 0)
    largest = max((most for *_, most in adapters.values()), default=0.0)
    return {name: _size(*moved) for name, moved in {**adapters, **extras, ALL: (*whole, largest)}.items()}


def _moved(value: Tensor, before: Tensor | None) -> tuple[float, int, float]:
    """The squared norm of a change, how many entries it has, and the largest."""
    change = value.detach() if before is None else value.detach() - before.to(value.device)
    if not change.numel():
        return 0.0, 0, 0.0
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    return norm * norm, change.numel(), float(torch.linalg.vector_norm(change, float("inf")))


def _size(square: float, count: int, most: float) -> Size:
    return (square / max(count, 1)) ** 0.5, most


def kind_of(name: str) -> str:
    """A tensor's name without its numbers.

    >>> kind_of("layers.3.up.A"), kind_of("scale.4")
    ('layers.up.A', 'scale')
    """
    return ".".join(part for part in name.split(".") if not part.isdigit())


class Limits:
    """The largest sizes that count.

    Args:
        clients: the sizes of the round's first clients.
        ratio: how many times their median is still honest.
    """

    def __init__(self, clients: Sequence[Sizes], ratio: float) -> None:
        self.ratio = ratio
        seen: dict[str, list[Size]] = defaultdict(list)
        for name, size in (item for sizes in clients for item in sizes.items()):
            for key in {name, kind_of(name)} if size[0] > 0 else ():
                seen[key].append(size)
        self._medians = {
            key: (median_low(rms for rms, _ in found), median_low(most for _, most in found))
            for key, found in seen.items()
            if len(found) >= FEWEST
        }

    def times(self, name: str, size: Size) -> Size:
        """How many times the median a tensor's size is; 0 where there is none."""
        nothing = (math.inf, math.inf)
        medians = self._medians.get(name) or self._medians.get(kind_of(name)) or nothing
        floor = self._medians.get(ALL, nothing) if name.startswith("layers.") else (0.0, 0.0)
        rms, most = (own / max(median, least) for own, median, least in zip(size, medians, floor, strict=True))
        return rms, most

    def fault(self, sizes: Sizes) -> str | None:
        """What changed too much; None if nothing did."""
        for name, size in sizes.items():
            for what, own, times in zip(
                ("root mean square", "largest entry"), size, self.times(name, size), strict=True
            ):
                if times > self.ratio:
                    return (
                        f"{name} changed by {own:.3g} ({what}), {times:.3g} times the median of the round's first "
                        f"clients; at most {self.ratio:g} times counts (rounds.max_ratio)"
                    )
        return None
