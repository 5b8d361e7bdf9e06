"""M, of the kinds that were found by trial: other forms of them, tried on what was built against the first ones."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from fault_cases.matrix import DROPPED, Row, judge
from fault_cases.round_of_five import A, Round, blob, field, tensor, tensors
from ubsmoe.maths.compensation import Sums
from ubsmoe.messages import Update
from ubsmoe.methods import build
from ubsmoe.wire.codec import Packed

B = A.replace(".A", ".B")
MASK = A.replace("adapters", "experts")
BYTES: dict[str, Callable[[Packed], Packed]] = {
    "bfloat16 in a float32 run": tensor(lambda t: t.bfloat16()),
    "float16": tensor(lambda t: t.half()),
    "int8 with its scales in a float32 run": tensors(
        lambda found: found | {A: found[A].to(torch.int8), A.replace("adapters", "scales"): torch.ones(6, 3, 1)}
    ),
    "NaN in the last entry of every tensor": tensors(
        lambda found: {n: poisoned(t) if t.is_floating_point() else t for n, t in found.items()}
    ),
    "a mask of all experts and rows of two": tensors(
        lambda found: found | {A: found[A][:2], MASK: torch.ones(6, dtype=torch.bool)}
    ),
    "a mask of no expert and rows of all": tensors(lambda found: found | {MASK: torch.zeros(6, dtype=torch.bool)}),
    "a mask of as many experts in another shape": tensors(
        lambda found: found | {MASK: torch.ones(2, 3, dtype=torch.bool)}
    ),
    "a mask of bytes": tensors(lambda found: found | {MASK: torch.ones(6, dtype=torch.int8)}),
    "counts that are no whole numbers": tensor(lambda t: t.double(), "expert_tokens"),
    "B of another layer, transposed": tensors(
        lambda found: found | {B: found[B.replace(".0.", ".1.")].mT.contiguous()}
    ),
    "text beside the tensors": blob(lambda data: with_header(data, b'"__metadata__":{"a":"' + b"b" * 99_999 + b'"},')),
    "a name with a NUL": blob(lambda data: with_header(data, rb'"adapters.\u0000":{},')),
    "a header of no bytes": blob(lambda data: bytes(8) + data[8:]),
    "a header longer than the message": blob(lambda data: b"\xff" * 8 + data[8:]),
    "bytes after the last tensor": blob(lambda data: data + bytes(64)),
}
FIELDS: dict[str, Callable[[Packed], Packed]] = {
    "-2^63 examples": field("num_examples", -(2**63)),
    "a weight of 400 digits": field("num_examples", 10**400),
    "half an example more": field("num_examples", 14.5),
    "NaN seconds": field("seconds", float("nan")),
    "a loss of no number": field("loss", float("nan")),
    "half a round": field("round", 0.5),
    "round true": field("round", True),
    "the name of another client": field("client", "client-3"),
    "the name of nobody": field("client", "client-99"),
    "no name": field("client", ""),
    "tier 2^52": field("tier", 2**52),
    "a run of 100,000 letters": field("run", "x" * 100_000),
    "2^52 tokens of no assignment": lambda packed: field("tokens", 2**52)(field("assignments", 0)(packed)),
}


def variants(world: Round) -> Iterator[Row]:
    """All of them."""
    for name, spoil in (BYTES | FIELDS).items():
        state, dropped = world.receive([*world.packed[:-1], ("client-4", spoil(world.packed[-1][1]))])
        contained = world.is_mean_of_others(state) and len(dropped) == 1
        yield judge("M", name, DROPPED, contained, dropped[0].reason if dropped else "")
    yield from extras(world)


def extras(world: Round) -> Iterator[Row]:
    """What one method alone sends; names and shapes are as asked."""
    hetlora = build("hetlora", world.shape, {})
    for name, rank in {"rank 0": 0, "rank -1": -1, "rank 2^40": 2**40}.items():
        fault = hetlora.fault(replace(world.honest[-1], extras={"rank": torch.tensor(rank)}))
        yield judge("M", f"HetLoRA's {name}", DROPPED, bool(fault), fault or "")
    for method, extra in {"flame": "scale.4", "hfedmoe": "importance"}.items():
        fault = build(method, world.shape, {}).fault(
            replace(world.honest[-1], extras={extra: torch.tensor([torch.nan])})
        )
        yield judge("M", f"{method}'s {extra} is NaN", DROPPED, bool(fault), fault or "")
    yield from sums(world)


def sums(world: Round) -> Iterator[Row]:
    """Sums for the compensation, which are whole numbers: of no tokens, or of more than a client looks at."""
    shape = replace(world.shape, top_ks=(2, 4), batch_tokens=64)
    method = build("fedavg", shape, {"compensation": {"rank": 2, "fit": "clients", "tokens": 64}})
    draw = torch.Generator().manual_seed(0)
    true = Sums.of(torch.randn(50, 18, generator=draw), torch.randn(50, 12, generator=draw))

    def sent(one: Sums) -> Update:
        named = {f"sums.{layer}.2.{name}": value for layer in (0, 1) for name, value in one.fixed().items()}
        return replace(world.honest[-1], extras=named)

    assert method.fault(sent(true)) is None
    for name, lie in {
        "of no tokens": replace(true, count=0 * true.count),
        "of more tokens than there are": replace(true, count=1e6 * true.count),
        "of negative squares": replace(true, gram=-true.gram),
        "without their outputs' energy": replace(true, energy=0 * true.energy),
        "a thousand times the outputs": replace(true, cross=1000 * true.cross),
    }.items():
        fault = method.fault(sent(lie))
        yield judge("M", f"a compensation's sums {name}", DROPPED, bool(fault), fault or "")


def poisoned(found: torch.Tensor) -> torch.Tensor:
    found = found.clone()
    found.view(-1)[-1] = torch.nan
    return found


def with_header(data: bytes, more: bytes) -> bytes:
    """The same tensors, more said of them in front."""
    length = int.from_bytes(data[:8], "little")
    text = b"{" + more + data[9 : 8 + length]
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
