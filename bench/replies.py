"""What 1,000 generated bad replies cost a server: each must be that client's drop, at a peak of the task's size + 64 MiB.

    python bench/replies.py [--count 1000] [--seed 0] [--out FILE]

The task asks for 64 MiB of tensors (16 layers of 64 experts). A reply is an honest one, in any of the three [wire] dtypes, spoiled
in one to three of the ways below. It goes the server's whole way, from bytes to the last check. The peak is the process's own
(VmHWM of /proc/self/status, reset before each reply, so Linux), above what it held with the reply's bytes at hand.
"""

import argparse
import ctypes
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ubsmoe.messages import Profile, Task, Update
from ubsmoe.server.update_checks import Rejected, check_update
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.json_text import encode_json
from ubsmoe.wire.codec import decode_update, encode_update
from ubsmoe.wire.form import SENT_AS, UpdateSpec, spec_of
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES, Packed, WireError

LAYERS, EXPERTS, RANK, WIDTH = 16, 64, 8, 512
ROOM = 64 << 20
RESULTS = Path(__file__).with_name("results") / "replies.json"
DTYPES = {"F64", "BOOL", "C64", "I64", "U8", "F32", "BF16", "I8"}
Header = dict[str, Any]
Spoil = Callable[[random.Random, Header], Header | bytes]


def an_update(width: int = WIDTH) -> tuple[Update, Task, UpdateSpec]:
    """An honest update of every tensor that the task asks for, 128 KiB for each unit of `width`."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        f"layers.{layer}.{matrix}": shape
        for layer in range(LAYERS)
        for matrix, shape in (
            *((f"{side}.A", (EXPERTS, RANK, width)) for side in ("up", "down")),
            *((f"{side}.B", (EXPERTS, width, RANK)) for side in ("up", "down")),
        )
    }
    sent = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    counts = torch.full((LAYERS, EXPERTS), 2)
    update = Update(
        "client-0", 1, 9, {name: value + 0.01 for name, value in sent.items()}, counts, EXPERTS, 2 * EXPERTS, 1.0, 1.0
    )
    form = UpdateSpec(spec_of(sent), {}, (counts.shape, counts.dtype))
    return update, Task(1, Profile("client-0", 0, 1.0, 2, RANK, 9), sent), form


def some(draw: random.Random, header: Header) -> str:
    return draw.choice(sorted(header))


def renamed(draw: random.Random, header: Header) -> Header:
    name = some(draw, header)
    other = draw.choice(["adapters.layers.99.up.A", "extras.phi", "../../x", "scales.x", "a" * 300, "\x1b[2J"])
    return {other if key == name else key: value for key, value in header.items()}


def reshaped(draw: random.Random, header: Header) -> Header:
    shape = draw.choice(
        [[0, 2**31, 2**31, 2], [2**52], [0], [], [EXPERTS, 2**30, 0], [1, RANK, WIDTH], [-1, 2], [2**31] * 4, [10**40]]
    )
    return header | {(name := some(draw, header)): {**header[name], "shape": shape}}


def many(draw: random.Random, header: Header) -> Header:
    shape, count = draw.choice([[0], [0, 2**20, 2**20], [2**20]]), draw.choice([100, 4000, 12_000])
    return header | {f"adapters.x{i}": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for i in range(count)}


def masked(draw: random.Random, header: Header) -> Header:
    """No expert touched, of as many as the mask says: few bytes for many."""
    name = draw.choice([name for name in sorted(header) if name.startswith("adapters.")])
    shape = header[name]["shape"]
    end = header[name]["data_offsets"][0]
    mask = {"dtype": "BOOL", "shape": [draw.choice([EXPERTS, 2**24, 2**40])], "data_offsets": [end, end]}
    return header | {
        name: {**header[name], "shape": [0, *shape[1:]], "data_offsets": [end, end]},
        name.replace("adapters", "experts"): mask,
    }


SPOILS: dict[str, Spoil] = {
    "another name": renamed,
    "another shape": reshaped,
    "another dtype": lambda draw, header: (
        header | {(n := some(draw, header)): {**header[n], "dtype": draw.choice(sorted(DTYPES - {header[n]["dtype"]}))}}
    ),
    "other offsets": lambda draw, header: (
        header | {(n := some(draw, header)): {**header[n], "data_offsets": [0, draw.choice([0, 1, 2**31, 2**52])]}}
    ),
    "a tensor missing": lambda draw, header: {k: header[k] for k in draw.sample(sorted(header), len(header) - 1)},
    "many tensors": many,
    "masks": masked,
    "many fields": lambda draw, header: header | {"adapters.x": {str(i): 0 for i in range(50_000)}},
    "deep": lambda draw, header: b"[" * draw.choice([500, 500_000]),
    "a long number": lambda draw, header: b'{"x":' + b"9" * draw.choice([30, 5000, 900_000]) + b"}",
    "no object": lambda draw, header: draw.choice([b"", b"[]", b"null", b"\xff" * 99, b"[" + b"{}," * 300_000 + b"0]"]),
    "twice": lambda draw, header: json.dumps(header)[:-1].encode() + b',"expert_tokens":' + b"0}",
}
FIELDS: dict[str, Callable[[random.Random, Header], bytes]] = {
    "a field": lambda draw, fields: json.dumps(
        fields | {draw.choice(sorted(fields)): draw.choice([-1, 2**60, 1e308, "x" * 5000, None, [], True, 10**300])}
    ).encode(),
    "many more fields": lambda draw, fields: json.dumps(fields | {str(i): i for i in range(60_000)}).encode(),
    "deep fields": lambda draw, fields: b'{"client":' * 50_000,
}
VALUES = {"NaN": float("nan"), "infinity": float("inf"), "1e38": 1e38}


def bad_reply(draw: random.Random, good: Packed) -> tuple[str, Packed]:
    """An honest reply, spoiled; its hash fits."""
    length = int.from_bytes(good.tensors[:8], "little")
    header, data = json.loads(good.tensors[8 : 8 + length]), good.tensors[8 + length :]
    fields, kind = json.loads(good.header), draw.random()
    if kind < 0.1:
        name, value = draw.choice(sorted(VALUES.items()))
        tensors = safetensors.torch.load(good.tensors)
        place = draw.choice([key for key, tensor in tensors.items() if tensor.is_floating_point()])
        tensors[place].view(-1)[-1] = value
        return name, sealed(fields, safetensors.torch.save(tensors))
    if kind < 0.25:
        name = draw.choice(sorted(FIELDS))
        return name, Packed(FIELDS[name](draw, fields), good.tensors)
    if kind < 0.35:
        return "cut off", sealed(fields, good.tensors[: draw.randrange(len(good.tensors))])
    names = [draw.choice(sorted(SPOILS)) for _ in range(draw.randint(1, 3))]
    spoiled: Header | bytes = header
    for name in names:
        spoiled = SPOILS[name](draw, spoiled) if isinstance(spoiled, dict) else spoiled
    text = spoiled if isinstance(spoiled, bytes) else json.dumps(spoiled).encode()
    rest = data if draw.random() < 0.5 else b""
    return " + ".join(names), sealed(fields, len(text).to_bytes(8, "little") + text + rest)


def sealed(fields: Header, tensors: bytes) -> Packed:
    return Packed(json.dumps(fields | {"sha256": hashlib.sha256(tensors).hexdigest()}).encode(), tensors)


def outcome(packed: Packed, task: Task, form: UpdateSpec, dtype: Any) -> str:
    """What the server makes of a reply: "wire" or "validation", which are drops, "read", or what it died of."""
    try:
        update = decode_update(packed, MAX_MESSAGE_BYTES, task.payload, form, dtype)
        check_update(update, task, form, max_change=1.0, run=(task.profile.top_k,), most_tokens=10_000)
        return "read"
    except WireError:
        return "wire"
    except Rejected:
        return "validation"
    except Exception as error:
        return type(error).__name__


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `reset`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def reset() -> None:
    """Let the most memory so far be what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(count: int, seed: int) -> dict[str, Any]:
    """Every reply's outcome, and the largest peak above the task's own size."""
    update, task, form = an_update()
    give_back = ctypes.CDLL(None).malloc_trim  # memory that is free, but not given back, would hide a peak
    draw, outcomes, worst = random.Random(seed), Counter[str](), (0, "")
    good = {dtype: encode_update(update, task.payload, dtype) for dtype in SENT_AS}
    for dtype, packed in good.items():
        assert outcome(packed, task, form, dtype) == "read", dtype
    for number in range(count):
        dtype = sorted(good)[number % len(good)]
        name, packed = bad_reply(draw, good[dtype])
        give_back(0)
        before = memory("VmRSS")
        reset()
        found = outcome(packed, task, form, dtype)
        worst = max(worst, (memory("VmHWM") - before, name))
        outcomes[found] += 1
        if found not in ("wire", "validation"):
            print(f"{name} ({dtype}): {found}", flush=True)
    return {
        "replies": count,
        "seed": seed,
        "declared_bytes": form.num_bytes,
        "outcomes": dict(outcomes),
        "largest_peak_bytes": worst[0],
        "by": worst[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    record = measured(chosen.count, chosen.seed)
    print(json.dumps(record, indent=1))
    atomic_write(chosen.out, encode_json(record, indent=1))
    dropped = sum(record["outcomes"].get(name, 0) for name in ("wire", "validation"))
    sys.exit(dropped < chosen.count or record["largest_peak_bytes"] > record["declared_bytes"] + ROOM)


if __name__ == "__main__":
    main()
