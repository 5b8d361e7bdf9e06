"""The codec: what goes in comes out, and whatever else comes in is one typed error, before memory is spent on it."""

import hashlib
import json
import struct
import tracemalloc
from dataclasses import asdict, replace

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from hypothesis import example, given

from ubsmoe.config import WireDtype
from ubsmoe.messages import MOST_STEPS_TOLD
from ubsmoe.wire.codec import (
    MAX_HEADER_BYTES,
    Packed,
    WireError,
    decode_task,
    decode_update,
    encode_task,
    encode_update,
)
from unit.wire.messages import COUNTS, TASK, UPDATE

ROOM = 1 << 16
GOOD = encode_update(UPDATE, TASK.payload)


def blob(entries: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header."""
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sealed(header: bytes, tensors: bytes) -> Packed:
    """A message whose hash fits, as whoever lies on purpose sends it."""
    try:
        fields = json.loads(header)
        return Packed(json.dumps({**fields, "sha256": hashlib.sha256(tensors).hexdigest()}).encode(), tensors)
    except (ValueError, TypeError):
        return Packed(header, tensors)


def refused(tensors: bytes, header: bytes = GOOD.header, room: int = ROOM) -> str:
    with pytest.raises(WireError) as caught:
        decode_update(sealed(header, tensors), room, TASK.payload)
    return str(caught.value)


def test_an_update_survives_the_wire_bit_for_bit() -> None:
    back = decode_update(GOOD, ROOM, TASK.payload)
    plain = {name: value for name, value in asdict(UPDATE).items() if not isinstance(value, dict | torch.Tensor)}
    assert {name: getattr(back, name) for name in plain} == plain
    assert torch.equal(back.expert_tokens, UPDATE.expert_tokens) and back.expert_tokens.dtype == torch.int64
    assert torch.equal(back.adapters["layers.0.up.A"], UPDATE.adapters["layers.0.up.A"])
    assert torch.equal(back.extras["phi"], UPDATE.extras["phi"]) and int(back.extras["rank"]) == 3


CHANGED = encode_update(UPDATE, TASK.payload, "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_change_travels_without_the_experts_it_left_alone(dtype: WireDtype) -> None:
    before = TASK.payload["layers.0.up.A"]
    after = before.clone()
    after[[1, 4]] += torch.linspace(-0.5, 0.3, 24).reshape(2, 3, 4)
    sent = replace(UPDATE, adapters={"layers.0.up.A": after})
    packed = encode_update(sent, TASK.payload, dtype)
    back = decode_update(packed, ROOM, TASK.payload)
    got = back.adapters["layers.0.up.A"]
    assert got.dtype == torch.float32 and torch.equal(got[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(
        got, after, rtol=0, atol={"float32": 0.0, "bfloat16": 0.5 / 256, "int8": 0.5 / 254}[dtype]
    )
    assert torch.equal(back.extras["phi"], UPDATE.extras["phi"]) and torch.equal(back.expert_tokens, COUNTS)
    data = len(packed.tensors) - 8 - int.from_bytes(packed.tensors[:8], "little")
    numbers = {"float32": 4 * 24, "bfloat16": 2 * 24, "int8": 24 + 4 * 6}[dtype]
    assert data == numbers + 5 + 4 * 10 + 8 + 8 * 10  # which experts, phi, rank, counts


def test_what_was_not_sent_down_is_measured_from_zero() -> None:
    fresh = torch.tensor([[[0.0, 0.0]], [[1.0, -0.5]], [[-0.0, 0.0]]])
    sent = replace(UPDATE, adapters={"layers.1.up.B": fresh})
    back = decode_update(encode_update(sent, TASK.payload), ROOM, TASK.payload)
    assert torch.equal(back.adapters["layers.1.up.B"], fresh)
    assert back.adapters["layers.1.up.B"][2].signbit().any()  # a zero's sign is a bit like others


def test_a_change_of_something_else_than_the_task_is_refused() -> None:
    with pytest.raises(WireError, match=r"layers.0.up.A has shape \[5, 3, 4\], sent was \[5, 2, 4\]"):
        decode_update(CHANGED, ROOM, {"layers.0.up.A": torch.zeros(5, 2, 4)})


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"adapters.x": torch.zeros(3)}, "no tensor of experts"),
        ({"scales.x": torch.zeros(3, 1)}, "no tensor of experts"),
        ({"adapters.x": torch.zeros(3, 2, dtype=torch.int64)}, "is torch.int64"),
        ({"adapters.x": torch.zeros(3, 2, dtype=torch.bool)}, "is torch.bool"),
        ({"adapters.x": torch.zeros(3, 2, dtype=torch.int8)}, "int8 and scales go together"),
        ({"adapters.x": torch.zeros(3, 2), "scales.x": torch.zeros(3, 1)}, "int8 and scales go together"),
        ({"adapters.x": torch.zeros(3, 2, dtype=torch.int8), "scales.x": torch.zeros(3, 2)}, "scales of shape [3, 2]"),
        ({"adapters.x": torch.zeros(3, 2), "experts.x": torch.tensor([True, False, True])}, "says otherwise"),
        ({"adapters.x": torch.zeros(1, 2), "experts.x": torch.tensor([[True]])}, "says otherwise"),
        ({"adapters.x": torch.zeros(1, 2), "experts.x": torch.tensor([1])}, "says otherwise"),
        (
            {"adapters.x": torch.zeros(0, 900, 900), "experts.x": torch.zeros(9, dtype=torch.bool)},
            "bytes that are taken",
        ),
        ({"side.x": torch.zeros(1, 2)}, "no tensor 'side.x'"),
        ({"adapters": torch.zeros(1, 2)}, "no tensor 'adapters'"),
    ],
)
def test_a_change_whose_parts_do_not_fit_is_refused(parts: dict[str, torch.Tensor], reason: str) -> None:
    tensors = safetensors.torch.save({**parts, "expert_tokens": COUNTS})
    with pytest.raises(WireError) as caught:
        decode_update(sealed(CHANGED.header, tensors), ROOM, TASK.payload)
    assert reason in str(caught.value)


def test_a_task_survives_the_wire_and_equal_payloads_are_equal_bytes() -> None:
    back = decode_task(encode_task(TASK), ROOM)
    assert (back.round, back.profile, back.run, back.base) == (4, TASK.profile, "run-1", "f00d")
    assert all(torch.equal(back.payload[name], value) for name, value in TASK.payload.items())
    other = replace(
        TASK, profile=replace(TASK.profile, client="client-9"), payload=dict(reversed(TASK.payload.items()))
    )
    assert encode_task(other).tensors == encode_task(TASK).tensors


def test_a_flipped_bit_in_a_weight_is_found() -> None:
    flipped = GOOD.tensors[:-1] + bytes([GOOD.tensors[-1] ^ 1])
    assert sealed(GOOD.header, flipped).header != GOOD.header
    decode_update(sealed(GOOD.header, flipped), ROOM, TASK.payload)  # a sound message, to all but the hash
    with pytest.raises(WireError, match="SHA-256"):
        decode_update(replace(GOOD, tensors=flipped), ROOM, TASK.payload)


def test_a_task_is_no_update() -> None:
    task = encode_task(TASK)
    assert "header" in refused(GOOD.tensors, task.header)
    assert "no tensor 'layers.0.up.A'" in refused(task.tensors)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (b"", "a header of 0 bytes in a blob of 0"),
        (GOOD.tensors[:-1], "tensors: "),
        (GOOD.tensors + b"x", "tensors: "),
        (b"\x80\x04\x95pickle of something." * 3, "a header of"),
        (blob(b"[" * 20_000), "no JSON object"),
        (blob(b'{"a":1,"a":2}'), "a name is repeated"),
        (blob([]), "expected an object"),
        (blob({f"adapters.{i}": entry("F32", [0], 0, 0) for i in range(5000)}), "at most 4096 tensors"),
        (blob({"../../etc/passwd": entry("F32", [1], 0, 4)}, b"0000"), "pattern"),
        (blob({"adapters.x": entry("F64", [1], 0, 8)}, b"0" * 8), "F32"),
        (blob({"adapters.x": entry("U8", [4], 0, 4)}, b"0" * 4), "F32"),
        (blob({"adapters.x": entry("C64", [1], 0, 8)}, b"0" * 8), "F32"),
        (blob({"adapters.x": entry("F32", [1 << 50], 0, 4)}, b"0000"), "tensors: "),
        (blob({"adapters.x": entry("F32", [2**40, 2**40], 0, 4)}, b"0000"), "tensors: "),
        (blob({"adapters.x": entry("F32", [-1], 0, 4)}, b"0000"), "greater than or equal to 0"),
        (blob({"adapters.x": entry("F32", [1, 1, 1, 1, 1], 0, 4)}, b"0000"), "at most 4 items"),
        (blob({"__metadata__": {"format": "pt"}}), "__metadata__"),
        (blob({}), "'expert_tokens'"),
    ],
)
def test_bytes_that_are_no_update_are_refused_with_a_reason(tensors: bytes, reason: str) -> None:
    assert reason in refused(tensors, room=1 << 20)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_examples", float("nan")),
        ("num_examples", -1),
        ("num_examples", 1e12),
        ("num_examples", 2**60),
        ("num_examples", True),
        ("num_examples", "many"),
        ("loss", float("inf")),
        ("loss", None),
        ("seconds", -1.0),
        ("client", "x" * 300),
        ("kind", "task"),
        ("evil", "posix.system"),
        ("steps.0.1", [[1, float("inf"), 0.1, 0.1]]),
        ("steps.0.0", [[True, 1.0, 0.1, 0.1]]),
        ("steps.0.3", [[1, 1.0, 0.1]]),
        ("steps", [[1, 1.0, 0.1, 0.1]] * (MOST_STEPS_TOLD + 1)),
    ],
)
def test_a_header_field_of_another_kind_is_refused_by_name(field: str, value: object) -> None:
    header = {**json.loads(GOOD.header), field.partition(".")[0]: value}
    assert f"header, {field}" in refused(GOOD.tensors, json.dumps(header).encode())


def test_a_client_of_an_earlier_version_tells_no_steps() -> None:
    header = {name: value for name, value in json.loads(GOOD.header).items() if name != "steps"}
    assert decode_update(sealed(json.dumps(header).encode(), GOOD.tensors), ROOM, TASK.payload).steps == ()


def test_too_large_a_message_costs_no_memory() -> None:
    huge = blob({"adapters.x": entry("F32", [1 << 22], 0, 1 << 24)}, bytes(1 << 24))
    tracemalloc.start()
    assert "at most 65536 are taken" in refused(huge)
    assert "a header of" in refused(struct.pack("<Q", 1 << 40) + b"{}")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert "are taken" in refused(GOOD.tensors, b" " * (MAX_HEADER_BYTES + 1), 1 << 30)


@given(st.binary(max_size=400), st.integers(0, len(GOOD.tensors) - 1), st.integers(0, 255), st.integers(0, 4))
@example(b"", 8, 0, 2)
def test_whatever_comes_is_an_update_or_a_wire_error(junk: bytes, place: int, value: int, kind: int) -> None:
    tensors, header = (GOOD, CHANGED)[place % 2].tensors, (GOOD, CHANGED)[place % 2].header
    place %= len(tensors)
    flipped = tensors[:place] + bytes([value]) + tensors[place + 1 :]
    spot = place % len(header)
    forms = [
        Packed(header, junk),
        Packed(junk, tensors),
        Packed(header, flipped),
        Packed(header, tensors[:place] + junk),
        Packed(header[:spot] + bytes([value]) + header[spot + 1 :], tensors),
    ]
    try:
        decode_update(sealed(forms[kind].header, forms[kind].tensors), ROOM, TASK.payload)
    except WireError as error:
        assert str(error)
