"""The wire's decoders under atheris, which steers its inputs by the code that they reach: `pip install atheris` first.

    python bench/fuzz.py [-runs=20000]      (any option of libFuzzer)

Inputs are mutations of good messages, half of them with the hash that fits. Anything but a message or a WireError ends it with a
code other than 0, and so does one allocation of more than the cap and 64 MiB. bench/faults.py mutates without being steered.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["ubsmoe.wire"]):
    from ubsmoe.wire import codec

from fault_cases.round_of_five import ROOM, Round, sealed

WORLD = Round()
UPDATE, TASK = WORLD.honest[0], WORLD.tasks[0]
GOOD = [codec.encode_task(TASK), *(codec.encode_update(UPDATE, TASK.payload, dtype) for dtype in ("float32", "int8"))]


def one_input(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    packed = GOOD[given.ConsumeIntInRange(0, 2)]
    parts = [bytearray(packed.header), bytearray(packed.tensors)]
    for _ in range(given.ConsumeIntInRange(1, 4)):
        target = parts[given.ConsumeIntInRange(0, 1)]
        place = given.ConsumeIntInRange(0, min(len(target), 1200))
        target[place : place + given.ConsumeIntInRange(0, 40)] = given.ConsumeBytes(given.ConsumeIntInRange(0, 40))
    fits = given.ConsumeBool()
    message = sealed(*map(bytes, parts)) if fits else codec.Packed(*map(bytes, parts))
    with contextlib.suppress(codec.WireError):
        codec.decode_task(message, ROOM) if packed is GOOD[0] else codec.decode_update(message, ROOM, TASK.payload)


if __name__ == "__main__":
    limits = [f"-malloc_limit_mb={ROOM // 2**20 + 64}", "-rss_limit_mb=4096", "-max_len=400"]
    runs = [] if any(option.startswith("-runs") for option in sys.argv[1:]) else ["-runs=20000"]
    atheris.Setup([sys.argv[0], *limits, *runs, *sys.argv[1:]], one_input)
    atheris.Fuzz()
