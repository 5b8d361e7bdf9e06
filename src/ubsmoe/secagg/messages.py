"""What server and clients say to each other in a secure round, as JSON headers; a masked vector travels beside its header.

    server: Terms       client: Offer     keys for this round, signed
    server: Roster      client: Boxes     shares of its secrets, each in a box for one other client
    server: Start       client: Masked    the masked vector, after training
    server: Survivors   client: Revealed  for every other client one share: of its seed if it answered, of its key if it vanished

Reading is strict: an unknown key, a wrong type or too much of anything is a WireError.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ubsmoe.wire.packed import MAX_HEADER_BYTES, WireError

Name = Annotated[str, Field(min_length=1, max_length=200)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Hex = Annotated[str, Field(max_length=2000, pattern=r"^([0-9a-f]{2})*$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Shape = Annotated[list[Annotated[int, Field(ge=0, lt=2**40)]], Field(max_length=4)]


class Message(BaseModel):
    """A header of the protocol."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    @classmethod
    def read(cls, header: bytes) -> Self:
        """The message in these bytes. Raises WireError if there is none."""
        if len(header) > MAX_HEADER_BYTES:
            raise WireError(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are taken")
        try:
            json.loads(header, object_pairs_hook=_unique)  # pydantic would keep the last of two entries of one name
            return cls.model_validate_json(header)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            raise WireError(f"{cls.__name__}, {'.'.join(map(str, fault['loc']))[:200]}: {fault['msg']}") from None
        except (ValueError, RecursionError) as error:
            raise WireError(f"{cls.__name__}: {error}"[:200]) from None

    def bytes(self) -> bytes:
        """The message as it travels."""
        return self.model_dump_json().encode()


class Terms(Message):
    """What a round is summed by. A client compares all of it with its own run file.

    `session` is drawn by the server for each try at a round; `fraction` is how many bits of a weight lie below one.
    """

    run: Annotated[str, Field(max_length=200)]
    round: Count
    session: Key
    threshold: float
    neighbours: int | None
    clients: Count
    max_weight: Count
    word: Literal[32, 64]
    bits: Count
    fraction: Count
    clip: float


class Offer(Message):
    """One client's public keys of a session and the SHA-256 of its mask's seed; `signer` names the key that signed them."""

    session: Key
    client: Name
    mask_key: Key
    box_key: Key
    commitment: Key
    signer: Annotated[str, Field(max_length=200)] = ""
    signature: Hex = ""

    def content(self) -> bytes:
        """What is signed."""
        return b"ubsmoe secagg offer " + self.model_copy(update={"signature": ""}).bytes()


class Roster(Message):
    """The offers of all clients of a session."""

    session: Key
    offers: list[Offer]


class Boxes(Message):
    """Boxes by the client that they are for; or, on their way down, by the client that they are from."""

    session: Key
    boxes: dict[Name, Hex]


class Start(Message):
    """The beginning of the work: the boxes from others, the task's header, and the names and shapes of what is summed."""

    session: Key
    boxes: dict[Name, Hex]
    task: str
    layout: dict[Name, Shape]


class Masked(Message):
    """The header of a masked vector."""

    session: Key
    client: Name
    seconds: Annotated[float, Field(ge=0)]


class Survivors(Message):
    """Who answered, and who vanished after the exchange of shares; of those whose shares the receiver holds."""

    session: Key
    survived: list[Name]
    vanished: list[Name]


class Revealed(Message):
    """Shares of the seeds of those who answered, and of the keys of those who vanished."""

    session: Key
    seeds: dict[Name, Hex]
    keys: dict[Name, Hex]


def _unique(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is repeated")
    return found
