"""[privacy] in a round: the clients' updates go in, and one contribution comes out, their noisy mean.

The method aggregates it as if a single client had answered, so whatever it computes is as private as the mean. It must therefore be
a method for which a lone client's update is the mean (`Method.refuses` says which are not).
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ubsmoe.config import PrivacySettings, RunSettings
from ubsmoe.maths import privacy
from ubsmoe.messages import Tensors
from ubsmoe.methods.method import Contribution
from ubsmoe.methods.sums import COUNTS, with_delta
from ubsmoe.seeds import generator_for
from ubsmoe.wire.form import UpdateSpec


def spent(settings: RunSettings, rounds: int) -> dict[str, float]:
    """Epsilon and delta after so many rounds."""
    chosen = settings.privacy
    assert chosen is not None
    drawn = settings.clients_per_round / settings.clients.count if settings.clients.sampling == "poisson" else 1.0
    return {
        "epsilon": privacy.epsilon(chosen.noise_multiplier, drawn, rounds, chosen.delta),
        "delta": chosen.delta,
    }


def noisy_mean(
    vectors: Iterable[Mapping[str, Tensor]],
    sent: Tensors,
    spec: UpdateSpec,
    settings: PrivacySettings,
    wanted: int,
    mean_top_k: float,
    key: tuple[str | int, ...],
) -> Contribution:
    """One contribution in the place of all, as maths/privacy.py defines it; memory does not grow with clients.

    Args:
        vectors: the clients', clipped (`private_vector`), or a sum of them; maybe none.
        sent: what a client is sent; the same for all.
        spec: names and shapes of an update, known without looking at any.
        settings: [privacy].
        wanted: m.
        mean_top_k: experts per token that the utilization is given for: known without looking at any update.
        key: of the noise; who knows it, as anybody knows privacy.seed, can take the noise off. The noise follows from the
            sum too, so that under no key two different sums ever have the same, whose difference would be bare.
    """
    shapes = {name: shape for name, (shape, _) in {**spec.adapters, **spec.extras}.items()}
    sums: dict[str, Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
    sums[COUNTS] = torch.zeros(spec.expert_tokens[0], dtype=torch.float64)
    for vector in vectors:
        for name, value in vector.items():
            sums[name] += value
    scale, generator = settings.noise_multiplier * settings.clip_norm, generator_for(*key, "noise", _sha256(sums))
    mean = {name: privacy.noisy(total, scale, generator) / wanted for name, total in sums.items()}
    shares = privacy.shares_from(mean.pop(COUNTS) / settings.clip_norm)
    return Contribution(
        client="",
        weight=1.0,
        adapters=with_delta({name: sent[name] for name in spec.adapters}, sent, mean),
        expert_tokens=shares * mean_top_k,
        tokens=1.0,
        assignments=mean_top_k,
        extras=with_delta({name: sent[name] for name in spec.extras}, sent, mean),
    )


def _sha256(sums: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for total in sums.values():
        digest.update(total.numpy().data)
    return digest.hexdigest()
