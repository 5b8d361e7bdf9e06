"""A message as bytes: a JSON header and one safetensors blob, and nothing else; never a type's name, never code.

A task goes down whole, in float32. An update comes up as the change of what the task sent (`wire.change`), in the run's [wire]
dtype; counts are int64. Experts are fused, so an adapter is a handful of tensors per layer.

The reader does not trust the bytes: the header is checked against caps, and against what the task asked for (`wire.form`), before a
tensor is allocated. Every fault is a WireError, whatever Python makes of it. The hash in the header finds damage by disks and
networks; against malicious senders there are TLS and update validation.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, TypeAdapter, ValidationError
from torch import Tensor

from ubsmoe.config import ExpertFormat, NamedFormat, WireDtype
from ubsmoe.errors import printable
from ubsmoe.messages import CLIENT_NAME, MOST_STEPS_TOLD, Announcement, Profile, Step, Task, Tensors, Update
from ubsmoe.wire.change import ChangeError, pack_change, unpack_change
from ubsmoe.wire.form import Declared, UpdateSpec, check_declared
from ubsmoe.wire.packed import MAX_HEADER_BYTES, Packed, WireError

MAX_TENSORS = 4096
MAX_FIELDS_BYTES = 1 << 14  # a dozen fields; pydantic lists every one too many
MAX_ANNOUNCED = 4096

AnyHeader = TypeVar("AnyHeader", bound="_Header")
Text = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Name = Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")]
ClientName = Annotated[str, Field(pattern=CLIENT_NAME)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class _Header(_Part):
    sha256: Text  # of the blob: a flipped bit in a weight is a weight like any other


class _Profile(_Part):
    client: ClientName
    tier: Count
    budget: Annotated[float, Field(gt=0, le=1)]
    top_k: Count
    rank: Count
    num_examples: Count
    experts: ExpertFormat | None


class _TaskHeader(_Header):
    kind: Literal["task"] = "task"
    round: Count
    run: Text
    base: Text
    profile: _Profile


class _UpdateHeader(_Header):
    kind: Literal["update"] = "update"
    client: ClientName
    tier: Count
    round: Count
    run: Text
    base: Text
    num_examples: Count
    tokens: Count
    assignments: Count
    loss: float
    seconds: Annotated[float, Field(ge=0)]
    steps: Annotated[
        tuple[Step, ...], Field(max_length=MOST_STEPS_TOLD)
    ] = ()  # a client of an earlier version tells none


class _Announcement(_Part):
    client: ClientName
    num_examples: Annotated[int, Field(ge=1, lt=2**53)]
    budget: Annotated[float, Field(gt=0, le=1)] | None
    experts: NamedFormat | None


_ANNOUNCEMENTS = TypeAdapter(Annotated[list[_Announcement], Field(max_length=MAX_ANNOUNCED), FailFast()])


class _Entry(BaseModel):
    """One line of a safetensors header; offsets and sizes are for safetensors itself to check."""

    model_config = ConfigDict(strict=True, extra="forbid")
    dtype: Literal["F32", "BF16", "I8", "I64", "BOOL"]
    shape: Annotated[list[Count], Field(max_length=4)]
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


_NOT_IN_UPDATE = {"kind", "sha256"}
_PARTS = {"adapters", "scales", "experts", "extras"}
_ENTRIES = TypeAdapter(dict[Name, _Entry])


def encode_announcements(announcements: Sequence[Announcement]) -> Packed:
    """The clients that one machine offers, as bytes."""
    return Packed(_ANNOUNCEMENTS.dump_json([_Announcement(**asdict(one)) for one in announcements]), b"")


def decode_announcements(packed: Packed) -> list[Announcement]:
    """The clients that a machine offers; the server decides whether it wants them. Raises WireError."""
    if len(packed.header) > MAX_HEADER_BYTES:
        raise WireError(f"announcements of {len(packed.header)} bytes; at most {MAX_HEADER_BYTES} are taken")
    with _refusing("announcement"):
        return [Announcement(**one.model_dump()) for one in _ANNOUNCEMENTS.validate_json(packed.header)]


def encode_task(task: Task) -> Packed:
    """A task as bytes."""
    blob, profile = _blob(task.payload), _Profile(**asdict(task.profile))
    header = _TaskHeader(sha256=_sha256(blob), round=task.round, run=task.run, base=task.base, profile=profile)
    return Packed(header.model_dump_json().encode(), blob)


def decode_task(packed: Packed, max_bytes: int) -> Task:
    """A task from bytes. Raises WireError for anything that is not one, or larger than `max_bytes`."""
    with _refusing("task"):
        header, tensors = _read(packed, _TaskHeader, max_bytes)
    return Task(header.round, Profile(**header.profile.model_dump()), tensors, header.run, header.base)


def encode_update(update: Update, before: Tensors, dtype: WireDtype = "float32") -> Packed:
    """An update as bytes.

    Args:
        update: what a client returns.
        before: the payload of the task it answers.
        dtype: precision of the change; "float32" loses nothing.
    """
    fields = {name: getattr(update, name) for name in _UpdateHeader.model_fields if name not in _NOT_IN_UPDATE}
    tensors = {
        "expert_tokens": update.expert_tokens,
        **pack_change(update.adapters, before, dtype),
        **{f"extras.{name}": value for name, value in update.extras.items()},
    }
    blob = _blob(tensors)
    return Packed(_UpdateHeader(sha256=_sha256(blob), **fields).model_dump_json().encode(), blob)


def decode_update(
    packed: Packed, max_bytes: int, before: Tensors, spec: UpdateSpec | None = None, dtype: WireDtype = "float32"
) -> Update:
    """An update from bytes; `server.validator` judges whether it answers the task.

    Args:
        packed: the bytes.
        max_bytes: no more are taken, and no more are unpacked.
        before: the payload of the task it answers.
        spec: what an update to that task looks like. Leave it out only for bytes of this machine's own processes.
        dtype: the run's [wire] dtype, which the change must have where there is a `spec`.

    Raises:
        WireError: for anything that is not an update, is larger than `max_bytes`, or changes something else.
    """
    with _refusing("update"):
        return _decode_update(packed, max_bytes, before, spec, dtype)


def _decode_update(
    packed: Packed, max_bytes: int, before: Tensors, spec: UpdateSpec | None, dtype: WireDtype
) -> Update:
    header, tensors = _read(packed, _UpdateHeader, max_bytes, spec, dtype)
    expert_tokens = tensors.pop("expert_tokens", None)
    if wrong := [name for name in tensors if name.partition(".")[0] not in _PARTS or "." not in name]:
        raise WireError(f"an update has no tensor {wrong[0]!r}")
    if expert_tokens is None:
        raise WireError("an update needs the tensor 'expert_tokens'")
    extras = {name.partition(".")[2]: tensors.pop(name) for name in list(tensors) if name.startswith("extras.")}
    try:
        adapters = unpack_change(tensors, before, max_bytes)
    except ChangeError as error:
        raise WireError(f"tensors: {error}") from None
    fields = {name: value for name, value in header if name not in _NOT_IN_UPDATE}
    return Update(**fields, adapters=adapters, expert_tokens=expert_tokens, extras=extras)


def _blob(tensors: Tensors) -> bytes:
    # copies, because safetensors refuses tensors that share memory
    packed = {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    return safetensors.torch.save(packed)


def _read(
    packed: Packed,
    kind: type[AnyHeader],
    max_bytes: int,
    spec: UpdateSpec | None = None,
    dtype: WireDtype = "float32",
) -> tuple[AnyHeader, dict[str, Tensor]]:
    size = len(packed.header) + len(packed.tensors)
    if size > max_bytes or len(packed.header) > MAX_FIELDS_BYTES:
        raise WireError(
            f"a message of {size} bytes, {len(packed.header)} in its header; at most {max_bytes} are taken, "
            f"{MAX_FIELDS_BYTES} in a header"
        )
    try:
        header = kind.model_validate_json(packed.header)
    except ValidationError as error:
        raise WireError(f"header, {_first_fault(error)}") from None
    declared = _declared(packed.tensors, max_bytes)
    if spec is not None:
        check_declared(declared, spec, dtype)
    if header.sha256 != _sha256(packed.tensors):
        raise WireError("tensors: their SHA-256 is not the header's")
    try:
        tensors = safetensors.torch.load(packed.tensors)
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise WireError(f"tensors: {error}") from None
    return header, dict(sorted(tensors.items()))


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _declared(data: bytes, max_bytes: int) -> Declared:
    """What the blob's header declares, after the checks that safetensors does not make.

    Those are caps, repeated names, names that are paths, dtypes that are never sent, and shapes whose strides no tensor can have.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise WireError(f"tensors: a header of {length} bytes in a blob of {len(data)}, at most {MAX_HEADER_BYTES}")
    try:
        entries = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"tensors: the header is no JSON object of distinct names ({error})") from None
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise WireError(f"tensors: expected an object of at most {MAX_TENSORS} tensors")
    return {name: _entry(name, entry, max_bytes) for name, entry in entries.items()}


def _entry(name: str, entry: Any, max_bytes: int) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of one line of the header; one at a time, so that the first fault ends it."""
    if isinstance(entry, dict) and len(entry) > len(_Entry.model_fields):
        raise WireError(f"tensors, {printable(name)}: {len(entry)} fields, expected {', '.join(_Entry.model_fields)}")
    try:
        found = _ENTRIES.validate_python({name: entry})[name]
    except ValidationError as error:
        raise WireError(f"tensors, {_first_fault(error)}") from None
    if math.prod(max(size, 1) for size in found.shape) > max_bytes:  # an element takes a byte or more
        raise WireError(f"tensors: {name} of shape {found.shape} is more than the {max_bytes} bytes that are taken")
    return found.dtype, tuple(found.shape)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make whatever goes wrong with somebody's bytes, MemoryError included, a WireError."""
    try:
        yield
    except WireError:
        raise
    except ValidationError as error:
        raise WireError(f"{what}, {_first_fault(error)}") from None
    except Exception as error:
        raise WireError(f"{what} cannot be read: {type(error).__name__}: {printable(str(error))}") from None


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{printable('.'.join(map(str, fault['loc'])), 200) or 'as a whole'}: {printable(fault['msg'])}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is repeated")
    return found
