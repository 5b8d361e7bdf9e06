"""A message as it travels. Apart from the codec, because whoever only passes one on needs no torch."""

from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 2 << 30  # a task or an update as a whole


class WireError(ValueError):
    """Bytes that are not the message they should be; the text says what is wrong."""


@dataclass(frozen=True)
class Packed:
    """A message ready to travel. Equal tensors give equal blobs, so a payload that many clients get is stored once."""

    header: bytes
    tensors: bytes
