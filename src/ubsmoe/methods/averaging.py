"""Rules of averaging, a part: how the clients' adapters become one.

    factors      theta <- sum_c p_c theta_c,   p_c = n_c / sum n                                          the default
    activation   theta_i <- sum_c g_{c,i} theta_{c,i} / sum_c g_{c,i},   g_{c,i} = (a_{c,i} / tokens_c)^t n_c   per expert i
    exact        factors, and beside them what the mean of factors gets wrong (fedex_lora.py)
    svd          clients train B alone; the mean update's singular vectors become the factors (fedsvd.py)
    alternating  clients train B in odd rounds, A in even ones (rolora.py)
    aligned      factors, each client's turned towards what it was sent (fedrot.py)
    corrected    factors, B corrected towards the mean of products (lora_fair.py)

n_c counts the examples of client c, a_{c,i} the tokens that it routed to expert i, tokens_c all its tokens. With `activation` an
expert that nobody used stays bit for bit, and a client that never used an expert has no say in it. With `exponent` set, the rules
below it weigh so too, except `exact`.

| rule | the mean of updates | rank | up, of an adapter | the server needs |
|---|---|---|---|---|
| factors | not exact | r | all | a sum |
| activation | not exact | r | all | a sum, weighed by use |
| exact | exact | grows by r for every client | all; down all and the sum so far | each client's own factors |
| svd, alternating | exact | r | half | a sum |
| aligned, corrected | nearer | r | all | each client's own factors |

Where a sum is enough, secure aggregation, [robust] and [privacy] are possible; weights by use exclude [privacy].

Source: activation: FLAME (Le et al. 2025, arXiv 2506.16600); exact: FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432);
svd: FedSVD (Lee et al. 2025, arXiv 2505.12805); alternating: RoLoRA (Chen et al. 2025, arXiv 2502.01755); aligned: FedRot-LoRA
(Zhang et al. 2026, arXiv 2602.23638); corrected: LoRA-FAIR (Bian et al. 2024, arXiv 2411.14961).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ubsmoe.config import RobustSettings
from ubsmoe.maths import robust
from ubsmoe.maths.means import Mean, WeightedMean
from ubsmoe.methods.fedex_lora import with_exact_averaging
from ubsmoe.methods.fedrot import with_alignment
from ubsmoe.methods.fedsvd import with_singular_factors
from ubsmoe.methods.lora_fair import with_correction
from ubsmoe.methods.method import Method, RunShape, by_use, refuse
from ubsmoe.methods.refusals import USE_WEIGHS
from ubsmoe.methods.rolora import with_alternating_factors


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Averaging:
    """[method.averaging]."""

    rule: Literal["factors", "activation", "exact", "svd", "alternating", "aligned", "corrected"] = "factors"
    """Which of the rules."""
    exponent: Annotated[float, Field(ge=0)] | None = None
    """t, how much use counts in a client's weight for an expert; left out, 1 for `activation` and 0 for the others."""


def with_averaging(build: Callable[[RunShape], Method], shape: RunShape, settings: Averaging) -> Method:
    """The method that `build` makes, averaging by this rule.

    Raises:
        ValueError: if the method averages in a way of its own, or the rule cannot weigh by use.
    """
    rule, exponent = settings.rule, settings.exponent
    if exponent is None:
        exponent = float(rule == "activation")
    if exponent and rule == "exact":
        raise ValueError(f"averaging.exponent is {exponent}, but rule 'exact' weighs by examples; leave exponent out")
    if rule == "activation" or exponent:
        shape = replace(shape, weigh=by_use(exponent))
        method = build(shape)
        method = replace(method, refuses={**USE_WEIGHS, **method.refuses})
    else:
        method = build(shape)
    refuse(method, "averaging")
    return RULES.get(rule, unchanged)(method, shape)


def unchanged(method: Method, shape: RunShape) -> Method:
    """The rules that are weights and nothing else."""
    return method


RULES: Mapping[str, Callable[[Method, RunShape], Method]] = {
    "exact": with_exact_averaging,
    "svd": with_singular_factors,
    "alternating": with_alternating_factors,
    "aligned": with_alignment,
    "corrected": with_correction,
}
"""What a rule puts around the method, beyond its weights."""


def mean_of(settings: RobustSettings) -> Callable[[], Mean]:
    """What methods average with under this rule."""
    if settings.rule in ("trimmed_mean", "median"):
        return partial(robust.TrimmedMean, settings.attackers, median=settings.rule == "median")
    return WeightedMean
