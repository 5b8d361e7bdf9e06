"""Which client is which node, who has a place in the run, and who is there to be asked.

A run has `clients.count` places. A node may hold its share of them: the places over the nodes that are online, rounded up. That
is what machines of one run file need, and what a machine with data of its own does. A node that announces more gets its share, and
gives up what it held above it once others come.

A place is kept for a node that is away, until somebody asks for a place and none is free. A client that missed a deadline is away
too, until its node answers again: Flower takes a minute to notice that a node has died. The place of a client that was silent for
`SILENT_ROUNDS` rounds is as free, whatever its node announces. Flower's Grid shows the nodes that are online: one that was
unregistered looks as if away.

Whatever nodes say is data: a client's name follows a pattern, and a node is told about in a few lines, however much it announces.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ubsmoe.config import ConfigError
from ubsmoe.data.partition import client_names
from ubsmoe.errors import UserError
from ubsmoe.messages import Announcement, Profile
from ubsmoe.server.federation import Federation, assign_tier

SILENT_ROUNDS = 3
LINES_AT_ONCE, LINES_PER_NODE = 3, 30


class Roster:
    """The places of a run.

    Args:
        federation: the server's side of it.
        log: called with a line for each client that joins or is refused.
    """

    def __init__(self, federation: Federation, log: Callable[[str], None]) -> None:
        self._federation, self._log = federation, log
        self._count = federation.settings.clients.count
        self._names = client_names(federation.settings)
        self._profiles: dict[str, Profile] = {}
        self._nodes: dict[str, int] = {}
        self._registered: dict[int, str] = {}
        self._online: set[int] = set()
        self._announced: dict[int, list[Announcement]] = {}
        self._silent = Counter[str]()
        self._missed: set[str] = set()
        self._said: dict[int, list[str]] = {}

    def here(self) -> list[Profile]:
        """The clients that can be asked, in client order, which is not the order of joining."""
        there = [profile for name, profile in self._profiles.items() if not self._away(name)]
        return sorted(there, key=lambda profile: (self._place(profile.client), profile.client))

    def nodes(self) -> list[dict[str, Any]]:
        """Every place that is taken: client, node, tier, examples, and whether it can be asked; for people to look at."""
        return [
            {
                "client": name,
                "node": str(node),  # up to 2^64, which is no number in every reader's JSON
                "online": not self._away(name),
                "tier": self._profiles[name].tier,
                "examples": self._profiles[name].num_examples,
            }
            for name, node in self._nodes.items()
        ]

    def node_of(self, client: str) -> int | None:
        """The node that is this client; None if it has lost its place."""
        return self._nodes.get(client)

    def see(self, online: Mapping[int, str]) -> None:
        """Which nodes are online, and the names that their keys are registered as. Admits who waits for a place."""
        self._registered |= online
        self._online = set(online)
        for node in [node for node in self._announced if node in online]:
            self._admit(node)

    def announce(self, node: int, clients: Sequence[Announcement]) -> None:
        """A node says which clients it is. More than there are places are not even remembered."""
        self._missed -= set(self._held(node))
        self._announced[node] = list(clients[: self._count])
        self._admit(node, len(clients) - self._count)

    def refuse(self, node: int, reason: str) -> None:
        """What a node announced is not to be read."""
        self._say(node, [f"node {node} is refused: {reason}"])

    def heard(self, client: str, answered: bool) -> None:
        """Whether a client that was asked said anything before its time was up; if not, its node must announce it again."""
        self._silent[client] = 0 if answered else self._silent[client] + 1
        if not answered:
            self._missed.add(client)

    def _admit(self, node: int, beyond: int = 0) -> None:
        refused = []
        for one in self._announced[node]:
            try:
                self._add(one, node)
            except UserError as error:
                refused.append(f"node {node}: client {one.client!r} is refused: {error}")
        more = len(refused) - LINES_AT_ONCE + max(beyond, 0)
        self._say(node, refused[:LINES_AT_ONCE] + ([f"node {node}: {more} more are refused"] if more > 0 else []))

    def _say(self, node: int, lines: Sequence[str]) -> None:
        """Say what has not been said of this node, up to so many lines in a run."""
        said = self._said.setdefault(node, [])
        for line in lines:
            if line not in said and len(said) < LINES_PER_NODE:
                said.append(line)
                self._log(line)

    def _add(self, one: Announcement, node: int) -> None:
        profile = assign_tier(self._federation, one)
        name, holder = self._registered[node], self._nodes.get(one.client)
        if name and name != one.client:
            raise ConfigError(f"its key is registered as {name!r}")
        if not name and one.client in self._registered.values():
            raise ConfigError("another key is registered under this name; register this node's with --name")
        if holder not in (None, node) and holder in self._online and self._registered[holder] == name:
            raise ConfigError(f"node {holder} is that client already")
        if holder != node and len(self._held(node)) >= self._share():
            raise ConfigError(f"its share is {self._share()} of clients.count = {self._count} places")
        if holder is None and len(self._nodes) >= self._count:
            self._make_room()
        if self._profiles.get(one.client) != profile or holder != node:
            own = f", {one.experts} experts" if one.experts else ""
            self._log(f"{one.client} is node {node}: {one.num_examples} examples, tier {profile.tier + 1}{own}")
        self._profiles[one.client], self._nodes[one.client] = profile, node
        if holder != node:
            self._missed.discard(one.client)

    def _away(self, client: str) -> bool:
        return self._nodes[client] not in self._online or client in self._missed

    def _held(self, node: int) -> list[str]:
        return [client for client, holder in self._nodes.items() if holder == node]

    def _share(self) -> int:
        return math.ceil(self._count / max(1, len(self._online)))

    def _make_room(self) -> None:
        """Free the place of a client that is away, silent for long, or its node's last above the share.

        Raises:
            ConfigError: if there is none.
        """
        away = [client for client in self._nodes if self._away(client)]
        silent = [client for client in self._nodes if self._silent[client] >= SILENT_ROUNDS]
        above = [client for client, node in self._nodes.items() if len(self._held(node)) > self._share()]
        if not (free := [*away, *silent, *reversed(above)]):
            raise ConfigError(f"all places are taken: clients.count is {self._count}")
        self._log(f"{free[0]} gives up its place: node {self._nodes[free[0]]} is away, silent, or above its share")
        del self._nodes[free[0]], self._profiles[free[0]]

    def _place(self, client: str) -> int:
        return self._names.index(client) if client in self._names else len(self._names)
