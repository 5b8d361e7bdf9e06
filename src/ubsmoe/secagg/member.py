"""A client's side of a secure round, and all that it refuses to a server that would learn more than the sum.

Four steps, each with the `Memory` of the one before: `offer` keys, `seal` shares of the secrets for others, `mask` the vector,
`reveal` one share of each other client's secrets. The secrets live in the memory of one round and nowhere else.

Source: SecAgg (Bonawitz et al. 2017, ePrint 2017/281), figure 4, for an active server; SecAgg+ (Bell et al. 2020).
"""

import hashlib
from collections.abc import Callable
from typing import Literal

from jaxtyping import Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ubsmoe.errors import UserError
from ubsmoe.secagg.graph import holders, needed
from ubsmoe.secagg.keys import agree, lock, new_secret, public_of, unlock
from ubsmoe.secagg.masks import add_mask
from ubsmoe.secagg.messages import Boxes, Offer, Revealed, Roster, Survivors, Terms
from ubsmoe.secagg.shares import SHARE_BYTES, split

Sign = Callable[[Offer], Offer]
"""The same offer with the signature of this machine."""
Check = Callable[[Offer], None]
"""Raises Refusal for an offer that the key of its client did not sign."""


class Refusal(UserError):
    """What a client does not do for a server; its secrets stay with it."""


class Memory(BaseModel):
    """What a client keeps between the steps of one round; keys, seed and shares in hex.

    `offers` are the round's by client, `shares` by the client they are of: (of its seed, of its mask key). `summed` are those whose
    sum this client has helped to unmask in this round, in this session or an earlier one.
    """

    model_config = ConfigDict(frozen=True)
    client: str
    terms: Terms
    stage: Literal["offered", "sealed", "masked", "revealed"] = "offered"
    mask_key: str = ""
    box_key: str = ""
    seed: str = ""
    offers: dict[str, Offer] = {}
    shares: dict[str, tuple[str, str]] = {}
    summed: list[str] = []

    def after(self, stage: str, session: str) -> None:
        """Raise Refusal unless this session has come to that stage and no further."""
        if session != self.terms.session or stage != self.stage:
            raise Refusal(f"the session is {session[:8]}, expected {self.terms.session[:8]} once it is {self.stage!r}")

    @property
    def holders(self) -> list[str]:
        """Who holds shares of this client's secrets, and whose shares it holds."""
        return holders({name: one.mask_key for name, one in self.offers.items()}, self.terms.neighbours)[self.client]

    @property
    def needed(self) -> int:
        """How many of them restore a secret."""
        return needed(self.terms.threshold, len(self.holders))


def offer(client: str, terms: Terms, own: Terms, before: Memory | None, sign: Sign) -> tuple[Memory, Offer]:
    """Draw this round's secrets and offer the public keys.

    Args:
        client: who offers.
        terms: the server's.
        own: what the client's own run file says; run, round, session and fraction are not compared.
        before: the memory of the last round.
        sign: with the machine's registered key.

    Raises:
        Refusal: if the terms differ from the client's own, or a later round has begun. A round that broke off may be repeated: what
            it can tell is `reveal`'s to judge.
    """
    for name in ("threshold", "neighbours", "clients", "max_weight", "bits", "clip"):
        if getattr(terms, name) != getattr(own, name):
            raise Refusal(f"the server's {name} is {getattr(terms, name)}, this machine's {getattr(own, name)}")
    summed: list[str] = []
    if before and before.terms.run == terms.run:
        if terms.round < before.terms.round:
            raise Refusal(f"the server asks for round {terms.round} after round {before.terms.round}")
        summed = before.summed if terms.round == before.terms.round else []
    secrets = {name: new_secret() for name in ("mask_key", "box_key", "seed")}
    public = Offer(
        session=terms.session,
        client=client,
        mask_key=public_of(secrets["mask_key"]).hex(),
        box_key=public_of(secrets["box_key"]).hex(),
        commitment=hashlib.sha256(secrets["seed"]).hexdigest(),
    )
    kept = {name: secret.hex() for name, secret in secrets.items()}
    return Memory(client=client, terms=terms, summed=summed, **kept), sign(public)


def seal(memory: Memory, roster: Roster, fewest: int, check: Check) -> tuple[Memory, Boxes]:
    """Share the seed and the mask key among the holders, a box for each.

    Raises:
        Refusal: if a client is named twice, is of another session, is unsigned or signed by another key, if this client's own keys
            are not there, or if there are fewer than `fewest` clients.
    """
    memory.after("offered", roster.session)
    offers = {one.client: one for one in roster.offers}
    if len(offers) != len(roster.offers) or len({one.mask_key for one in roster.offers}) != len(offers):
        raise Refusal("the server names one client twice")
    if len(offers) < fewest:
        raise Refusal(f"the server names {len(offers)} clients, a sum needs {fewest}")
    mine = offers.get(memory.client)
    secret = bytes.fromhex(memory.mask_key)
    if mine is None or mine.mask_key != public_of(secret).hex():
        raise Refusal("the server names other keys for this client than its own")
    for one in roster.offers:
        if one.session != memory.terms.session:
            raise Refusal(f"the keys of {one.client} are of another session")
        check(one)
    memory = memory.model_copy(update={"offers": offers, "stage": "sealed"})
    names = memory.holders
    of_seed = split(bytes.fromhex(memory.seed), memory.needed, len(names))
    of_key = split(secret, memory.needed, len(names))
    by_name = dict(zip(names, zip(of_seed, of_key, strict=True), strict=True))
    own = by_name.pop(memory.client)
    boxes = {name: _lock(memory, name, seed + key).hex() for name, (seed, key) in by_name.items()}
    shares = {memory.client: (own[0].hex(), own[1].hex())}
    return memory.model_copy(update={"shares": shares}), Boxes(session=roster.session, boxes=boxes)


def mask(memory: Memory, boxes: Boxes, vector: Int[Tensor, " d"]) -> Memory:
    """Put the masks on the vector, in place: its own, and one shared with each holder whose box came.

    Raises:
        Refusal: if a box is of no holder or does not open, or if so few came that the sum could not be unmasked.
    """
    memory.after("sealed", boxes.session)
    shares = dict(memory.shares)
    for name, box in boxes.boxes.items():
        if name not in memory.holders or name == memory.client:
            raise Refusal(f"a box from {name}, who shares no mask with this client")
        content = _unlock(memory, name, bytes.fromhex(box))
        shares[name] = (content[:SHARE_BYTES].hex(), content[SHARE_BYTES:].hex())
    if len(shares) < memory.needed:
        raise Refusal(
            f"{len(shares)} of {len(memory.holders)} clients shared their secrets, {memory.needed} are needed"
        )
    add_mask(vector, bytes.fromhex(memory.seed), 1)
    for name in sorted(shares.keys() - {memory.client}):
        other = bytes.fromhex(memory.offers[name].mask_key)
        key = agree(bytes.fromhex(memory.mask_key), other, "mask", memory.terms.session)
        add_mask(vector, key, sign_of(memory.client, name))
    # secrets that are no longer needed here are forgotten
    return memory.model_copy(update={"shares": shares, "stage": "masked", "mask_key": "", "box_key": "", "seed": ""})


def reveal(memory: Memory, asked: Survivors, fewest: int) -> tuple[Memory, Revealed]:
    """One share of each other client's secrets: of the seed if it answered, of the key if it vanished, never of both.

    Raises:
        Refusal: if a client is named twice or in both lists, is none whose shares are held here, if this client itself is not among
            those who answered, if so few answered that their sum must not be seen, or if this round has been summed over others:
            the difference of two sums that differ in one client is that client's update.
    """
    memory.after("masked", asked.session)
    named = [*asked.survived, *asked.vanished]
    if len(set(named)) != len(named):
        raise Refusal("the server names one client twice: both shares of its secrets would unmask its update")
    if unknown := sorted(set(named) - memory.shares.keys()):
        raise Refusal(f"the server asks for a share of {unknown[0]}, which this client does not hold")
    if memory.client not in asked.survived:
        raise Refusal("the server says that this client vanished; both shares of its secrets would unmask its update")
    sees_all = len(memory.holders) == len(memory.offers)  # else only its neighbours are named to it
    least = max(memory.needed, fewest) if sees_all else memory.needed
    if len(asked.survived) < least:
        raise Refusal(f"the server would unmask a sum of {len(asked.survived)} clients, {least} are needed")
    survived = sorted(asked.survived)
    if memory.summed and survived != memory.summed:
        raise Refusal(
            f"round {memory.terms.round} has been summed over {len(memory.summed)} clients before and would now be over "
            f"{len(survived)} or others: the difference could be one client's update"
        )
    seeds = {name: memory.shares[name][0] for name in asked.survived}
    keys = {name: memory.shares[name][1] for name in asked.vanished}
    revealed = Revealed(session=asked.session, seeds=seeds, keys=keys)
    return memory.model_copy(update={"stage": "revealed", "shares": {}, "offers": {}, "summed": survived}), revealed


def sign_of(one: str, other: str) -> int:
    """The sign of their common mask in the vector of `one`: opposite in the vector of `other`."""
    return 1 if one < other else -1


def _lock(memory: Memory, receiver: str, content: bytes) -> bytes:
    session, public = memory.terms.session, bytes.fromhex(memory.offers[receiver].box_key)
    try:
        key = agree(bytes.fromhex(memory.box_key), public, "box", session)
    except ValueError:
        raise Refusal(f"the box key of {receiver} is not a valid key") from None
    return lock(key, content, f"{session} {memory.client} {receiver}")


def _unlock(memory: Memory, sender: str, box: bytes) -> bytes:
    session, public = memory.terms.session, bytes.fromhex(memory.offers[sender].box_key)
    key = agree(bytes.fromhex(memory.box_key), public, "box", session)
    try:
        content = unlock(key, box, f"{session} {sender} {memory.client}")
    except ValueError:
        raise Refusal(f"the box from {sender} does not open") from None
    if len(content) != 2 * SHARE_BYTES:
        raise Refusal(f"the box from {sender} holds {len(content)} bytes, expected {2 * SHARE_BYTES}")
    return content
