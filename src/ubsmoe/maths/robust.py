"""Byzantine-robust aggregation: how to average n clients' values x_c, up to f of which are malicious.

    clipping      x_c <- z + min(1, S / ||x_c - z||) (x_c - z)          z what was sent, S the longest change
    trimmed mean  per coordinate, without the f smallest and the f largest:   sum w_c x_c / sum w_c over the rest
    median        the trimmed mean that leaves one value, of an even number the two in the middle
    multi-Krum    score_c = sum over the n - f - 2 clients j nearest to c of ||x_c - x_j||^2; the n - f smallest stay
    capped use    q_c <- clip(q_c, median / gamma, gamma median)        q_c share of a client's work that an expert did

What is left of each coordinate lies between two honest values, whatever malicious clients send, if n > 2 f. Clipping bounds the
length of a malicious update and not its direction, so it is no rule of its own. Nobody knows f; the user
says how many to withstand.

Ours: trimmed values are averaged with the clients' weights, so that f = 0 is the plain mean; a malicious client that claims
a large weight still cannot leave the honest range. Per expert only the clients that have weight on it count; where they are 2 f or
fewer, nobody can tell which are malicious and the expert stays. The cap on use is ours (the paper trusts counts).

All rules but clipping need every update of a round at once: memory grows by (clients in a round) x (one adapter), plus, while
an expert is sorted, a few float64 copies of that expert's tensor per client.

Source: clipping: Sun et al. 2019 (arXiv 1911.07963); trimmed mean and median: Yin et al. 2018 (arXiv 1803.01498); Krum and
multi-Krum: Blanchard et al. 2017 (NeurIPS).
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ubsmoe.maths.means import Weight, checked_weight

Tensors = Mapping[str, Tensor]


def trimmed_mean(values: Float[Tensor, "C *x"], weights: Float[Tensor, " C"], trim: int) -> Float[Tensor, "*x"]:
    """Per coordinate, the weighted mean of what is left without the `trim` smallest and largest of C values, in float64.

    Raises:
        ValueError: if nothing would be left.

    >>> trimmed_mean(torch.tensor([[1.0], [2.0], [3.0], [1e9]]), torch.ones(4), trim=1)
    tensor([2.5000], dtype=torch.float64)
    """
    if trim < 0 or 2 * trim >= len(values):
        raise ValueError(f"cannot trim {trim} at each end of {len(values)} values")
    by_weight = weights.argsort(stable=True)  # which of equal values is trimmed must not depend on the clients' order
    values, weights = values[by_weight], weights[by_weight]
    kept = values.argsort(dim=0, stable=True)[trim : len(values) - trim]
    weight = weights.double()[kept]
    return (weight * values.double().gather(0, kept)).sum(0) / weight.sum(0)


class TrimmedMean:
    """In the place of a `WeightedMean`: the same calls, a trimmed mean or a median per coordinate.

    Args:
        attackers: f, trimmed at each end.
        median: trim all but the middle instead.
    """

    def __init__(self, attackers: int, median: bool = False) -> None:
        self._attackers, self._median = attackers, median
        self._given: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, tensors: Tensors, weight: Weight | Mapping[str, Weight]) -> None:
        """Count one client's tensors; arguments and errors as for `WeightedMean.add`. They are kept until the end."""
        weights = weight if isinstance(weight, Mapping) else dict.fromkeys(tensors, weight)
        checked = {}
        for name, tensor in tensors.items():
            checked[name] = checked_weight(name, tensor, weights)
            if name in self._given and self._given[name][0][0].shape != tensor.shape:
                raise ValueError(
                    f"{name}: got {[*tensor.shape]}, but earlier clients sent {[*self._given[name][0][0].shape]}"
                )
        for name, tensor in tensors.items():
            self._given.setdefault(name, []).append((tensor.detach(), checked[name]))

    def result(self, fallback: Tensors) -> dict[str, Tensor]:
        """The rule under each name of `fallback`, in its dtype; the fallback itself where 2 f or fewer have weight.

        Raises:
            ValueError: if tensors were added that the fallback does not have, or under another shape.
        """
        if unknown := sorted(self._given.keys() - fallback.keys()):
            raise ValueError(f"tensors {unknown} were averaged but are not among the {len(fallback)} expected ones")
        return {name: self._middle(name, tensor) for name, tensor in fallback.items()}

    def _middle(self, name: str, fallback: Tensor) -> Tensor:
        middle = fallback.clone()
        given = self._given.get(name, [])
        if given and given[0][0].shape != fallback.shape:
            raise ValueError(f"{name}: averaged {[*given[0][0].shape]}, expected {[*fallback.shape]}")
        if not fallback.ndim:
            given = [(tensor[None], weight[None]) for tensor, weight in given]
        for row in range(len(given[0][0]) if given else 0):
            voices = [(tensor[row], weight[row]) for tensor, weight in given if weight[row] > 0]
            if len(voices) > 2 * self._attackers:
                values, weights = (torch.stack(part) for part in zip(*voices, strict=True))
                trim = (len(voices) - 1) // 2 if self._median else self._attackers
                target = middle[row] if fallback.ndim else middle
                target.copy_(trimmed_mean(values, weights, trim))
        return middle


def clip_factor(norm: float, longest: float) -> float:
    """By what a change of this norm is multiplied to be no longer than `longest`.

    >>> clip_factor(8.0, 2.0), clip_factor(1.0, 2.0)
    (0.25, 1.0)
    """
    return 1.0 if norm <= longest else longest / norm


def squared_norm(change: Tensors) -> float:
    """||x||^2 over all tensors, in float64; summed by name, so that it does not depend on the order of a message."""
    return sum(float(change[name].double().contiguous().square().sum()) for name in sorted(change))


def squared_distances(clients: Sequence[Tensors]) -> Float[Tensor, "C C"]:
    """||x_c - x_j||^2 of every two clients over all their tensors, which have the same names and shapes."""
    total = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for name in sorted(clients[0]):
        for row in range(len(clients[0][name])):  # one expert at a time: float64 copies of it are all that is held
            flat = torch.stack([client[name][row].double().flatten() for client in clients])
            total += torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    return total


def krum_scores(distances: Float[Tensor, "C C"], attackers: int) -> Float[Tensor, " C"]:
    """Each client's sum of squared distances to the n - f - 2 others nearest to it.

    Raises:
        ValueError: unless n >= 2 f + 3.

    >>> points = [{"w": torch.tensor([place])} for place in (0.0, 1.0, 2.0, 9.0, 1.0)]
    >>> krum_scores(squared_distances(points), attackers=1).tolist()
    [2.0, 1.0, 2.0, 113.0, 1.0]
    """
    n = len(distances)
    if n < 2 * attackers + 3:
        raise ValueError(f"multi-Krum needs at least 2 f + 3 = {2 * attackers + 3} clients, got {n}")
    nearest = distances.sort(dim=1).values[:, 1:]  # the first is the client itself
    return nearest[:, : n - attackers - 2].sum(1)


def multi_krum(distances: Float[Tensor, "C C"], attackers: int) -> list[int]:
    """The n - f clients of smallest score, in client order; of equal scores the earlier client's goes first."""
    order = krum_scores(distances, attackers).argsort(stable=True)
    return sorted(order[: len(distances) - attackers].tolist())


def capped_shares(shares: Float[Tensor, "C L M"], cap: float) -> Float[Tensor, "C L M"]:
    """Clients' shares of each expert within a factor `cap` of the clients' median, per layer and expert.

    So falsified counts move an expert's utilization by no more than if each malicious client were `cap` times, or 1 / `cap` times,
    the median client; phi follows it. Rows then no longer sum to 1.

    >>> capped_shares(torch.tensor([[[0.5, 0.5]], [[0.25, 0.25]], [[0.0, 1.0]]]), cap=1.5).tolist()
    [[[0.375, 0.5]], [[0.25, 0.3333333432674408]], [[0.1666666716337204, 0.75]]]
    """
    middle = shares.quantile(0.5, dim=0)
    return shares.clamp(middle / cap, middle * cap)
