"""A message as it travels. Apart from the codec, because whoever only passes one on needs no torch."""

import json
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


def enclose(packed: Packed, **beside: str) -> Packed:
    """The message with more text in its header.

    >>> disclose(enclose(Packed(b"{}", b"blob"), client="a"), "client")
    (Packed(header=b'{}', tensors=b'blob'), ['a'])
    """
    return Packed(json.dumps({**beside, "header": packed.header.decode()}).encode(), packed.tensors)


def disclose(packed: Packed, *names: str) -> tuple[Packed, list[str]]:
    """What `enclose` was given. Raises WireError for anything that it did not make."""
    try:
        found = json.loads(packed.header)
        texts = [found[name] for name in ("header", *names)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WireError(f"a header without {', '.join(names)}") from None
    if not all(isinstance(text, str) for text in texts):
        raise WireError(f"a header in which {', '.join(names)} is no text")
    return Packed(texts[0].encode(), packed.tensors), texts[1:]
