"""Rules of averaging, a part: how the clients' adapters become one.

    factors     theta <- sum_c p_c theta_c,   p_c = n_c / sum n                                          the default
    activation  theta_i <- sum_c g_{c,i} theta_{c,i} / sum_c g_{c,i},   g_{c,i} = (a_{c,i} / tokens_c)^t n_c   per expert i
    exact       factors, and beside them what the mean of factors gets wrong (fedex_lora.py)

n_c counts the examples of client c, a_{c,i} the tokens that it routed to expert i, tokens_c all its tokens. With `activation` an
expert that nobody used stays bit for bit, and a client that never used an expert has no say in it.

Trimmed mean, median and multi-Krum are set in [robust] and go together with `factors` and `activation`.

Source: activation: FLAME (Le et al. 2025, arXiv 2506.16600); exact: FedEx-LoRA (Singhal et al. 2025, arXiv 2410.09432).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ubsmoe.config import RobustSettings
from ubsmoe.maths import robust
from ubsmoe.maths.means import Mean, WeightedMean
from ubsmoe.methods.fedex_lora import with_exact_averaging
from ubsmoe.methods.method import USE_WEIGHS, Method, RunShape, by_use, refuse


@dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False))
class Averaging:
    """[method.averaging]."""

    rule: Literal["factors", "activation", "exact"] = "factors"
    """Which of the rules."""
    exponent: Annotated[float, Field(ge=0)] = 1.0
    """t of `activation`, how much use counts; 0 is `factors`."""

    def __post_init__(self) -> None:
        if self.rule != "activation" and self.exponent != 1:
            raise ValueError(
                f"exponent belongs to rule 'activation', and the rule is {self.rule!r}; set it, or leave exponent out"
            )


def with_averaging(build: Callable[[RunShape], Method], shape: RunShape, settings: Averaging) -> Method:
    """The method that `build` makes, averaging by this rule.

    Raises:
        ValueError: if the method averages in a way of its own.
    """
    if settings.rule == "activation":
        method = build(replace(shape, weigh=by_use(settings.exponent)))
        method = replace(method, refuses={**USE_WEIGHS, **method.refuses})
    else:
        method = build(shape)
    refuse(method, "averaging")
    return with_exact_averaging(method, shape) if settings.rule == "exact" else method


def mean_of(settings: RobustSettings) -> Callable[[], Mean]:
    """What methods average with under this rule."""
    if settings.rule in ("trimmed_mean", "median"):
        return partial(robust.TrimmedMean, settings.attackers, median=settings.rule == "median")
    return WeightedMean
