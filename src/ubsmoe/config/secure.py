"""[secure_aggregation]: what a run file can say about it, and what does not go together with it."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from ubsmoe.config.section import Settings

if TYPE_CHECKING:
    from ubsmoe.config.settings import RunSettings

FEWEST_IN_A_SUM = 3  # of two, each knows the other's update from the sum


class SecureAggregationSettings(Settings):
    """[secure_aggregation]: the server sees sums and no client's update (docs/robustness.md); off when the section is left out."""

    threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.66, description="share of a round's clients that must stay to its end; fewer cannot unmask, not even together"
    )
    neighbours: Annotated[int, Field(ge=4)] | None = Field(
        None, description="how many others a client shares masks with, for rounds of hundreds; all when left out"
    )
    bits: Annotated[int, Field(ge=8, le=30)] = Field(
        16, description="of a changed number in the sum: 2^bits even steps from -clip to clip"
    )
    clip: PositiveFloat = Field(
        0.5, description="largest change of one number in a round, cut by the client; under [privacy] its clip_norm"
    )
    max_examples: PositiveInt = Field(
        4096, description="most examples of a client; with more it takes no part, since sums of integers need a bound"
    )


def conflict_with_secure(run: "RunSettings") -> str | None:
    """Why a run cannot have [secure_aggregation]; None if it can."""
    if run.robust != type(run.robust)() or run.rounds.extra_clients:
        return (
            "[secure_aggregation] shows the server no single update, which [robust] needs, and no first answers, which "
            "rounds.extra_clients counts; leave them out"
        )
    if run.rounds.max_ratio not in (None, type(run.rounds)().max_ratio):
        return (
            f"rounds.max_ratio = {run.rounds.max_ratio:g} judges single updates by their median, and [secure_aggregation] shows "
            "the server none; leave it out: there secure_aggregation.clip bounds what a client may change"
        )
    if run.wire.dtype != "float32":
        return (
            f'wire.dtype is "{run.wire.dtype}", but [secure_aggregation] sends integers of its own for every expert; leave it out '
            "and set secure_aggregation.bits"
        )
    if run.clients_per_round < FEWEST_IN_A_SUM:
        return (
            f"[secure_aggregation] needs {FEWEST_IN_A_SUM} clients in a round, there are {run.clients_per_round}: from a sum of "
            "two, each learns the other's update"
        )
    return None
