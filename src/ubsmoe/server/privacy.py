"""[privacy] in a round: the clients' updates go in, and one update comes out, their noisy mean.

The method aggregates that one update as if a single client had answered, so whatever it computes is as private as the mean. It
must therefore be a method for which a lone client's update is the mean (`Method.refuses` says which are not).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ubsmoe.config import PrivacySettings, RunSettings
from ubsmoe.maths import privacy
from ubsmoe.maths.robust import clip_factor, squared_norm
from ubsmoe.messages import Update
from ubsmoe.methods.method import State
from ubsmoe.server.checks import UpdateSpec
from ubsmoe.server.robust import delta_of, with_delta

USE, TOKENS = "expert_tokens", 1_000_000  # counts are whole: the noisy shares of this many tokens


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
    updates: Iterable[Update],
    state: State,
    form: UpdateSpec,
    settings: PrivacySettings,
    wanted: int,
    mean_top_k: float,
    generator: torch.Generator,
) -> Update:
    """One update in the place of all, as maths/privacy.py defines it; memory does not grow with clients.

    Args:
        updates: those that passed the gate, maybe none.
        state: what they were sent.
        form: names and shapes of an update, known without looking at any.
        settings: [privacy].
        wanted: m.
        mean_top_k: experts per token that the utilization is given for: known without looking at any update.
        generator: of the noise; whoever can rebuild it can take the noise off.
    """
    shapes = {name: shape for name, (shape, _) in {**form.adapters, **form.extras}.items()}
    sums: dict[str, Tensor] = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
    sums[USE] = torch.zeros(form.expert_tokens[0], dtype=torch.float64)
    for update in updates:
        use = settings.clip_norm * privacy.deviation(update.expert_tokens, update.assignments)
        change = {**delta_of(update, state), USE: use}
        factor = clip_factor(squared_norm(change) ** 0.5, settings.clip_norm)
        for name, value in change.items():
            sums[name] += factor * value
    scale = settings.noise_multiplier * settings.clip_norm
    mean = {name: privacy.noisy(total, scale, generator) / wanted for name, total in sums.items()}
    shares = privacy.shares_from(mean.pop(USE) / settings.clip_norm)
    counts = (shares * mean_top_k * TOKENS).round().long()
    nothing = Update(
        client="noisy mean",
        round=0,
        num_examples=1,
        adapters={name: state.adapters[name] for name in form.adapters},
        expert_tokens=counts,
        tokens=TOKENS,
        assignments=round(mean_top_k * TOKENS),
        loss=float("nan"),  # no client's loss is told
        seconds=0.0,
        extras={name: state.extras[name] for name in form.extras},
    )
    return with_delta(nothing, state, mean)
