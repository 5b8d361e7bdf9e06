"""A message as it travels. Apart from the codec, because whoever only passes one on needs no torch."""

from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 36
"""Of a task: room for FLoRA's side factor at OLMoE-1B-7B's size, 47 GB. Flower cuts what it carries into small chunks, so that
nothing on the way holds messages to 2 GiB. What an update may have follows from its task (`server.update_checks.UpdateSpec`)."""


class WireError(ValueError):
    """Bytes that are not the message they should be; the text says what is wrong."""


@dataclass(frozen=True)
class Packed:
    """A message ready to travel. Equal tensors give equal blobs, so a payload that many clients get is stored once."""

    header: bytes
    tensors: bytes
