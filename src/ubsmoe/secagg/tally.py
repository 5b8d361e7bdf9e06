"""The server's side of a secure round: it relays keys and boxes, adds up masked vectors, and takes the masks off their sum.

    sum_u x_u = sum_u y_u - sum_u PRG(seed_u) - sum_{v vanished} sum_{u neighbour} sign(u, v) PRG(pair key of u and v)

u runs over those who answered. A masked vector y_u is added as it comes and kept nowhere.
"""

import hashlib
from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from ubsmoe.errors import RoundError
from ubsmoe.secagg.graph import holders, needed
from ubsmoe.secagg.keys import agree, public_of
from ubsmoe.secagg.masks import add_mask
from ubsmoe.secagg.member import sign_of
from ubsmoe.secagg.messages import Boxes, Offer, Revealed, Roster, Survivors, Terms
from ubsmoe.secagg.shares import combine


class Tally:
    """One session: a round's keys, boxes and sum.

    Args:
        terms: of the session.
        fewest: clients below whom there is no sum.
    """

    def __init__(self, terms: Terms, fewest: int) -> None:
        self.terms, self._fewest = terms, fewest
        self._offers: dict[str, Offer] = {}
        self._boxes: dict[str, Boxes] = {}
        self._answered: list[str] = []
        self._total: Tensor | None = None
        self._graph: dict[str, list[str]] = {}

    def roster(self, offers: Mapping[str, Offer]) -> Roster:
        """The message to all who offered keys. Raises RoundError if they are too few."""
        self._offers = dict(sorted(offers.items()))
        self._check(len(offers), "after the exchange of keys")
        self._graph = holders({name: one.mask_key for name, one in self._offers.items()}, self.terms.neighbours)
        return Roster(session=self.terms.session, offers=list(self._offers.values()))

    def lacks(self, client: str, boxes: Boxes) -> bool:
        """Whether a client left out one of those it shares masks with, or has a box for another: the masks would not cancel."""
        return boxes.session != self.terms.session or {*boxes.boxes, client} != set(self._graph[client])

    def deliver(self, boxes: Mapping[str, Boxes]) -> dict[str, dict[str, str]]:
        """The boxes for each client by sender, given those of each sender. Raises RoundError if too few have sent theirs."""
        self._boxes = dict(sorted(boxes.items()))
        self._check(len(boxes), "after the exchange of shares")
        return {
            name: {sender: one.boxes[name] for sender, one in self._boxes.items() if name in one.boxes}
            for name in self._boxes
        }

    def add(self, client: str, vector: Int[Tensor, " d"]) -> None:
        """Count a client's masked vector."""
        if self._total is None:
            self._total = torch.zeros_like(vector)
        self._total += vector
        self._answered.append(client)

    def survivors(self) -> dict[str, Survivors]:
        """What to ask each client that answered. Raises RoundError if too few did."""
        self._check(len(self._answered), "after training")
        answered, vanished = set(self._answered), self._boxes.keys() - set(self._answered)
        return {
            name: Survivors(
                session=self.terms.session,
                survived=[one for one in self._graph[name] if one in answered],
                vanished=[one for one in self._graph[name] if one in vanished],
            )
            for name in sorted(answered)
        }

    def total(self, revealed: Mapping[str, Revealed]) -> Int[Tensor, " d"]:
        """The sum of the vectors of those who answered.

        Raises:
            RoundError: if shares are missing or do not fit; there is no sum then, and no part of one.
        """
        assert self._total is not None
        answered = set(self._answered)
        seeds = {name: self._seed(name, revealed) for name in sorted(answered)}
        keys = {name: self._key(name, revealed) for name in sorted(self._boxes.keys() - answered)}
        total = self._total.clone()
        for seed in seeds.values():
            add_mask(total, seed, -1)
        for gone, key in keys.items():
            for name in sorted(answered & set(self._graph[gone]) - {gone}):
                pair = agree(key, bytes.fromhex(self._offers[name].mask_key), "mask", self.terms.session)
                add_mask(total, pair, -sign_of(name, gone))
        return total

    def _seed(self, name: str, revealed: Mapping[str, Revealed]) -> bytes:
        found = self._restore(name, {holder: one.seeds.get(name) for holder, one in revealed.items()})
        if hashlib.sha256(found).hexdigest() != self._offers[name].commitment:
            raise RoundError(self._sentence(f"shares of the seed of {name} do not fit what it committed to"))
        return found

    def _key(self, name: str, revealed: Mapping[str, Revealed]) -> bytes:
        found = self._restore(name, {holder: one.keys.get(name) for holder, one in revealed.items()})
        if public_of(found).hex() != self._offers[name].mask_key:
            raise RoundError(self._sentence(f"shares of the key of {name} do not fit its public key"))
        return found

    def _restore(self, name: str, shares: Mapping[str, str | None]) -> bytes:
        """The secret of a client from the shares of as many holders as it takes."""
        group = self._graph[name]
        least = needed(self.terms.threshold, len(group))
        held = {
            group.index(holder) + 1: bytes.fromhex(share)
            for holder, share in shares.items()
            if share and holder in group
        }
        if len(held) < least:
            raise RoundError(self._sentence(f"{len(held)} clients gave shares of {name}, {least} are needed"))
        try:
            return combine(dict(sorted(held.items())[:least]))
        except ValueError as error:
            raise RoundError(self._sentence(f"shares of {name}: {error}")) from None

    def _check(self, count: int, when: str) -> None:
        if count < self._fewest:
            raise RoundError(
                self._sentence(
                    f"{count} of {self.terms.clients} clients are left {when}, secure_aggregation.threshold = "
                    f"{self.terms.threshold:g} needs {self._fewest}"
                )
            )

    def _sentence(self, what: str) -> str:
        return (
            f"round {self.terms.round}: {what}; nothing was unmasked and the checkpoint before is intact. See the events for "
            "who was dropped, then start again to go on"
        )
