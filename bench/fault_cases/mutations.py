"""D, in bulk: seeded mutations of good messages against the decoder."""

import random
import resource
from collections.abc import Iterator

from fault_cases.matrix import Row, judge
from fault_cases.round_of_five import ROOM, Round, sealed
from ubsmoe.wire.codec import WireError, decode_update, encode_update


def mutated(draw: random.Random, header: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Bytes replaced, cut out, put in and repeated, in the header or the tensors."""
    parts = bytearray(header), bytearray(data)
    target = parts[0] if draw.random() < 0.3 else parts[1]
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(target), draw.choice([8, 600, len(target)])) or 1)
        kind = draw.randrange(4)
        if kind == 0:
            target[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del target[place : place + draw.randint(1, 64)]
        elif kind == 2:
            target[place:place] = draw.randbytes(draw.randint(1, 64))
        else:
            target[place:place] = bytes(target[: draw.randint(1, 64)])
        if not target:
            break
    return bytes(parts[0]), bytes(parts[1])


def fuzz(world: Round, inputs: int) -> Iterator[Row]:
    """Half of them in float32, half in int8: each is read or refused by a WireError, whatever it holds."""
    update, sent, draw = world.honest[0], world.tasks[0].payload, random.Random(0)
    good = [encode_update(update, sent), encode_update(update, sent, "int8")]
    before, typed, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for number in range(inputs):
        packed = good[number % 2]
        try:
            decode_update(sealed(*mutated(draw, packed.header, packed.tensors)), ROOM, sent)
            read += 1
        except WireError:
            typed += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    declared = f"{inputs} read or typed error, memory within cap + 64 MiB"
    fits = typed + read == inputs and grown < ROOM / 2**20 + 64
    yield judge("D", f"{inputs} mutated messages", declared, fits, f"{typed} refused, +{grown:.0f} MiB", beyond=True)
