"""A packed message as Flower carries it: a ConfigRecord with the header, an ArrayRecord with the blob, uncut.

Flower stores equal blobs once, so a payload that many clients get is uploaded once.
"""

from dataclasses import dataclass
from typing import Literal

from ubsmoe.errors import printable, require
from ubsmoe.wire.packed import Packed, WireError

require("flwr", "flower")
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402

DATA_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)
"""What a message can make Flower's or our reading raise; a connection that fails raises something else and is no client's."""


SILENT = {
    ErrorCode.MESSAGE_UNAVAILABLE: "its answer did not come in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer did not come in time",
    ErrorCode.NODE_UNAVAILABLE: "its node is away: it sent no heartbeat for a minute, or was stopped",
}
"""What Flower itself answers in the place of a node that has said nothing, in our words."""


@dataclass(frozen=True)
class Unreadable:
    """An answer that Flower itself could not build, and why."""

    why: str


def to_record(packed: Packed) -> RecordDict:
    """The record that carries a packed message."""
    blob = Array(dtype="uint8", shape=(len(packed.tensors),), stype="safetensors", data=packed.tensors)
    return RecordDict({"header": ConfigRecord({"json": packed.header}), "blob": ArrayRecord({"safetensors": blob})})


def from_record(record: RecordDict) -> Packed:
    """The packed message in a record. Raises WireError for a record of any other shape."""
    try:
        header, blob = record.config_records["header"]["json"], record.array_records["blob"]["safetensors"].data
    except KeyError:
        raise WireError("a record without our header or blob") from None
    if not isinstance(header, bytes) or not isinstance(blob, bytes):
        raise WireError("a record whose header or blob is not bytes")
    return Packed(header, blob)


def content_of(message: Message | Unreadable, node: int) -> Packed:
    """The content of an answer, if it comes from the node that was asked; the SuperLink checks that too."""
    if isinstance(message, Unreadable):
        raise WireError(f"no message of Flower's: {message.why}")
    if message.has_error():
        raise WireError(error_text(message))
    if message.metadata.src_node_id != node:
        raise WireError(f"node {message.metadata.src_node_id} answered for node {node}")
    try:
        return from_record(message.content)
    except DATA_ERRORS as error:
        raise WireError(str(error)) from None


def failure(message: Message) -> tuple[Literal["deadline", "training"], str]:
    """At which stage a client whose message is an error was lost, and why: Flower's own errors are as silence."""
    silent = SILENT.get(message.error.code)
    return "deadline" if silent else "training", silent or error_text(message)


def error_text(message: Message) -> str:
    """What a node said for an error, in one line."""
    return printable(str(message.error.reason or "")) or "no reason given"
