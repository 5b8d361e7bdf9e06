"""FlexLoRA: average the updates themselves, and give each client the best factors of its own rank.

    S = sum_c p_c s_c B_c A_c,    S = U Sigma V^T,    p_c = n_c / sum n,    s_c = alpha / r_c
    client c gets    B_c = U_{:r_c} Sigma_{r_c} / s_c,    A_c = V^T_{:r_c}

Exact but for the cut, whose error is the root of the sum of the squared singular values that were left out. The
factors of all ranks are nested, so the server keeps those of the largest and cuts. No dense S is ever formed
(maths/spectra.py).

Ours: a direction that S does not have (more rank than S) keeps the row of A it had before, since with both factors
zero it could never learn; `split = "balanced"` puts the root of Sigma on both factors. An expert that a client did
not activate comes back as it was sent, cut to its rank, and counts with full weight; one that nobody activated stays
as it is, bit for bit. All of a round's factors are held at once.

Source: FlexLoRA (Bai et al. 2024, arXiv 2402.11505).
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ubsmoe.maths.lora import LoraPair, refill
from ubsmoe.maths.spectra import Split, truncated_svd
from ubsmoe.messages import Profile
from ubsmoe.methods.factors import at_rank, keep_untouched, mean_routers, pairs, rank_of, shares, tensors
from ubsmoe.methods.fedavg import fedavg
from ubsmoe.methods.method import Contribution, Method, RunShape, State
from ubsmoe.methods.refusals import OWN_FACTORS


def flexlora(shape: RunShape, *, split: Split = "b") -> Method:
    """Build the method.

    Args:
        shape: sizes of the run.
        split: "b" leaves all of Sigma on B, as published; "balanced" its root on each factor.
    """

    def dispatch(state: State, profile: Profile) -> dict[str, Tensor]:
        return at_rank(state.adapters, shape.alpha, profile.rank, split)

    def aggregate(state: State, contributions: Iterable[Contribution]) -> State:
        clients = list(contributions)
        if not any(one.weight for one in clients):
            return state
        weights, scale = shares(clients), shape.alpha / rank_of(state.adapters)
        factors = [pairs(one.adapters, shape.alpha) for one in clients]
        after = {}
        for name, before in pairs(state.adapters, shape.alpha).items():
            best = truncated_svd([client[name] for client in factors], weights, before.rank, split).pair
            after[name] = refill(LoraPair(best.a, best.b / scale, scale), before.a)
        expert_tokens = torch.stack([one.expert_tokens for one in clients]).sum(0)
        adapters = mean_routers(state.adapters, clients) | tensors(after)
        return replace(state, adapters=keep_untouched(state.adapters, adapters, expert_tokens))

    return replace(
        fedavg(shape), name="flexlora", dispatch=dispatch, aggregate=aggregate, varies="rank", refuses=OWN_FACTORS
    )
