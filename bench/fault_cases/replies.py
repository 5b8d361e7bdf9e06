"""B, C and D: one of five clients sends bytes that are not what it was asked for."""

import gzip
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fault_cases.matrix import BOUNDED, DROPPED, Row, judge
from fault_cases.round_of_five import (
    ROOM,
    A,
    Round,
    blob,
    counts,
    field,
    many,
    one,
    swapped,
    tensor,
    tensors,
    twice,
    within,
)
from ubsmoe.maths.robust import TrimmedMean
from ubsmoe.wire.codec import Packed

FIFTEEN: dict[str, Callable[[Packed], Packed]] = {
    "NaN": one(float("nan")),
    "Inf": one(float("inf")),
    "1e30": one(1e30),
    "wrong shape": tensor(lambda t: t[:, :, :5]),
    "broadcasting shape": tensor(lambda t: t[:1]),
    "extra dimension": tensor(lambda t: t[None]),
    "int8": tensor(lambda t: t.to(torch.int8)),
    "float64": tensor(lambda t: t.double()),
    "complex64": tensor(lambda t: t.to(torch.complex64)),
    "missing key": tensors(lambda found: {name: t for name, t in found.items() if name != A}),
    "extra key": tensors(lambda found: found | {"adapters.layers.9.up.A": found[A]}),
    "weight NaN": field("num_examples", float("nan")),
    "weight -39": field("num_examples", -39),
    "weight 1e12": field("num_examples", 10**12),
    "one extra metric": field("accuracy", 1.0),
}
"""What flwr's FedAvg is given too; the first eleven are content, the others what is said beside it."""

CONTENT = {
    "-Inf": one(-float("inf")),
    "transposed": tensor(lambda t: t.mT),
    "wrong rank for the tier": tensor(lambda t: t[:, :2]),
    "zero-size": tensor(lambda t: t[:0]),
    "float8": tensor(lambda t: t.to(torch.float8_e4m3fn)),
    "duplicate key": blob(twice),
    "expert index >= M": tensor(lambda t: torch.cat([t, t[:1]])),
    "a frozen base key": tensors(lambda found: found | {"model.embed_tokens.weight": found[A]}),
    "empty update": tensors(lambda found: {}),
    "A and B swapped": tensors(swapped),
    "all zeros": tensors(lambda found: {n: t if n == "expert_tokens" else t * 0 for n, t in found.items()}),
}
METADATA = {
    "weight 0": field("num_examples", 0),
    "weight bool": field("num_examples", True),
    "weight text": field("num_examples", "many"),
    "wrong round": field("round", 7),
    "wrong run id": field("run", "another"),
    "wrong base-model hash": field("base", "another"),
    "wrong tier": field("tier", 0),
    "utilization of wrong length": tensor(lambda t: t[:, :5], "expert_tokens"),
    "utilization negative": counts([10, 10, 1, -1, 0, 0]),
    "utilization sum is not tokens K": counts([10, 9, 0, 0, 0, 0]),
    "utilization above its tokens": counts([20, 0, 0, 0, 0, 0]),
}
TRANSPORT = {
    "bit flip in the header": blob(lambda data: data[:9] + bytes([data[9] ^ 128]) + data[10:]),
    "bit flip in a weight": lambda packed: replace(
        packed, tensors=packed.tensors[:-1] + bytes([packed.tensors[-1] ^ 1])
    ),
    "truncated": blob(lambda data: data[: len(data) // 2]),
    "over the size cap": blob(lambda data: data + bytes(ROOM)),
    "compressed bytes": blob(lambda data: gzip.compress(bytes(1 << 20))),
    "a header of 100,000 tensors": blob(many),
    "pickle bytes": blob(lambda data: b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix"),
    "a path in a tensor name": tensors(lambda found: found | {"adapters.../../x": found[A]}),
}

BEYOND = {"one extra metric", "utilization negative", "utilization above its tokens", "bit flip in the header"}


def bad_replies(world: Round) -> Iterator[Row]:
    """Each must be dropped, and the result be, bit for bit, the mean of the other four."""
    numbers = [name for name in FIFTEEN if name.startswith(("weight", "one extra"))]
    families = {"C": METADATA | {name: FIFTEEN[name] for name in numbers}, "D": TRANSPORT}
    families["B"] = {name: spoil for name, spoil in (FIFTEEN | CONTENT).items() if name not in numbers}
    for family, cases in sorted(families.items()):
        for name, spoil in cases.items():
            if name == "all zeros":
                yield all_zeros(world)
                continue
            state, dropped = world.receive([*world.packed[:-1], ("client-4", spoil(world.packed[-1][1]))])
            contained = world.is_mean_of_others(state) and [lost.client for lost in dropped] == ["client-4"]
            yield judge(family, name, DROPPED, contained, dropped[0].reason if dropped else "", name in BEYOND)


def all_zeros(world: Round) -> Row:
    """Finite, of the right form, a small change: no check can tell it from training. A median stays where the others are."""
    bad = CONTENT["all zeros"](world.packed[-1][1])
    state, dropped = world.receive([*world.packed[:-1], ("client-4", bad)], lambda: TrimmedMean(0, median=True))
    return judge("B", "all zeros", BOUNDED, not dropped and within(state, world.honest[:-1]))


def order_and_pace(world: Round) -> Iterator[Row]:
    """Twice the same answer, all 120 orders of five, and one that drips in so slowly that its round is over."""
    state, dropped = world.receive([*world.packed[:-1], world.packed[0]])
    yield judge("D", "duplicate", DROPPED, world.is_mean_of_others(state), dropped[0].reason)
    first, same = world.receive(world.packed)[0], 0
    for order in itertools.permutations(world.packed):
        state = world.receive(order)[0]
        same += all(torch.equal(value, first.adapters[name]) for name, value in state.adapters.items())
    yield Row("D", "reordered", "120/120 orders, the same bits", f"{same}/120 orders, the same bits")
    state, dropped = world.late("client-4", seconds=61.0, deadline=60.0)
    yield judge("D", "slow drip", DROPPED, world.is_mean_of_others(state), dropped[0].reason)
