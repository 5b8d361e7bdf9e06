"""[secure_aggregation] in a round: four exchanges with the clients, and one contribution that stands for all of them.

The server relays keys and boxes, adds up masked vectors and unmasks their sum. It never holds a client's update, so it cannot
validate one: what a sum can show is checked, everything else is the clients' (`client.secure`).
"""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ubsmoe.client.node_config import KEYS, SHARES_OF_KEYS, TRAIN, UNMASK
from ubsmoe.client.secure import limits_of, private_limit, rules_of, start_message, vector_in
from ubsmoe.errors import RoundError
from ubsmoe.messages import Dropped, Profile, Task
from ubsmoe.methods.method import Contribution, State, adapter_part
from ubsmoe.methods.sums import COUNTS, LOSS, SHARES, UTILIZATION, RoundSum, with_delta
from ubsmoe.secagg.messages import Boxes, Masked, Message, Offer, Revealed
from ubsmoe.secagg.tally import Tally
from ubsmoe.secagg.vector import WORDS, Sums, decode, size_of
from ubsmoe.server.federation import Federation
from ubsmoe.server.metrics import dominant
from ubsmoe.wire.codec import encode_task
from ubsmoe.wire.packed import Packed, WireError

Log = Callable[..., None]
Answer = TypeVar("Answer", bound=Message)
Tasks = Callable[[Sequence[Profile]], Iterable[Task]]


class Courier(Protocol):
    """What carries the messages of secure rounds: every engine does."""

    def ask(
        self, kind: str, round: int, messages: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | Dropped]]:
        """Send each client its message of this kind; yield each one's answer, or why there is none, in order."""
        ...


class SecureRound:
    """One try at a round.

    Args:
        federation: the run.
        courier: reaches the clients.
        number: of the round.
        log: gets the events.
    """

    def __init__(self, federation: Federation, courier: Courier, number: int, log: Log) -> None:
        self._federation, self._courier, self._number, self._log = federation, courier, number, log
        rules = rules_of(federation.settings, federation.method)
        own = {"run": federation.run_id, "round": number, "session": secrets.token_hex(32)}
        self._terms = rules.terms.model_copy(update=own)
        self._tally = Tally(self._terms, rules.fewest)
        self._examples: dict[str, int] = {}  # announced by those whose vectors came

    def contribution(
        self,
        clients: Sequence[Profile],
        tasks: Tasks,
        state: State,
        private: Callable[[Mapping[str, Tensor]], Contribution],
        enough: Callable[[int], None],
        most_examples: float = math.inf,
    ) -> Contribution:
        """What these clients come to together.

        Args:
            clients: those who are asked.
            tasks: makes the tasks of those who are left when training begins.
            state: the server's.
            private: gives the contribution of a private run, from the sums of the clients' clipped vectors.
            enough: raises RoundError if so few vectors do not make a round. Asked before anything is unmasked: of a round that was
                summed, clients help to sum no smaller part later.
            most_examples: that a client may count for. One with more is not asked, since a sum cannot count it for less.

        Raises:
            RoundError: if too few clients are left at any step, or the sum is none of valid updates.
        """
        layout, counts = self._layout(state)
        light = [one for one in clients if self._may_weigh(one, most_examples)]
        self._exchange_and_train(light, tasks, layout, size_of(layout, counts))
        survivors = self._tally.survivors()
        enough(len(survivors))
        total = self._tally.total(self._ask(UNMASK, survivors, Revealed))
        sums = decode(total, layout, counts, limits_of(layout, self._terms.clip), self._terms)
        if self._federation.settings.privacy:
            return private(sums.values)
        if found := dominant(self._examples):
            self._log("warning", self._number, **found)
        return self._plain(sums, self._sent(state))

    def _may_weigh(self, client: Profile, most: float) -> bool:
        light = client.num_examples <= most or self._federation.settings.privacy is not None
        if not light:
            reason = (
                f"it has {client.num_examples} examples and may weigh {most:g}, clients.max_weight times the median, which a sum "
                "cannot cut it down to"
            )
            self._drop(Dropped(client.client, self._number, "robust", reason))
        return light

    def _exchange_and_train(
        self, clients: Sequence[Profile], tasks: Tasks, layout: dict[str, list[int]], size: int
    ) -> None:
        names = [one.client for one in clients]
        offers = self._ask(KEYS, dict.fromkeys(names, self._terms), Offer)
        roster = self._tally.roster({name: one for name, one in offers.items() if self._is_from(name, one)})
        sealed = self._ask(SHARES_OF_KEYS, {one.client: roster for one in roster.offers}, Boxes)
        boxes = self._tally.deliver({name: one for name, one in sealed.items() if self._fits(name, one)})
        left = [one for one in clients if one.client in boxes]
        asked = dict[str, Task]()

        def messages() -> Iterator[tuple[str, Packed]]:
            for task in tasks(left):
                name = task.profile.client
                asked[name] = task
                yield name, start_message(self._terms.session, boxes[name], encode_task(task), layout)

        for name, answer in self._courier.ask(TRAIN, self._number, messages()):
            self._count(name, answer, asked.pop(name), size)

    def _count(self, name: str, answer: Packed | Dropped, task: Task, size: int) -> None:
        """Add a client's vector, or drop the client."""
        size_down = {"download_bytes": task.num_bytes}
        if isinstance(answer, Dropped):
            return self._drop(answer, **size_down)
        try:
            header = Masked.read(answer.header)
            if (header.session, header.client) != (self._terms.session, name):
                raise WireError("an answer of another session or client")
            self._tally.add(name, vector_in(answer, size, WORDS[self._terms.word]))
        except WireError as error:
            return self._drop(Dropped(name, self._number, "wire", str(error)), **size_down)
        profile = task.profile
        self._examples[name] = profile.num_examples
        public = {"tier": profile.tier, "top_k": profile.top_k, "rank": profile.rank, "examples": profile.num_examples}
        bytes_up = {"upload_bytes": len(answer.tensors)}
        self._log("client", self._number, client=name, **public, seconds=header.seconds, **size_down, **bytes_up)

    def _ask(self, kind: str, messages: Mapping[str, Message], answers: type[Answer]) -> dict[str, Answer]:
        """The answers to these messages by client; a client without one is dropped."""
        found = {}
        packed = ((name, Packed(message.bytes(), b"")) for name, message in messages.items())
        for name, answer in self._courier.ask(kind, self._number, packed):
            try:
                if isinstance(answer, Dropped):
                    self._drop(answer)
                else:
                    found[name] = answers.read(answer.header)
            except WireError as error:
                self._drop(Dropped(name, self._number, "wire", str(error)))
        return found

    def _is_from(self, name: str, one: Offer) -> bool:
        good = (one.client, one.session) == (name, self._terms.session)
        if not good:
            self._drop(Dropped(name, self._number, "validation", "its keys are of another client or session"))
        return good

    def _fits(self, name: str, one: Boxes) -> bool:
        lacks = self._tally.lacks(name, one)
        if lacks:
            self._drop(
                Dropped(name, self._number, "validation", "it shared its secrets with other clients than it had to")
            )
        return not lacks

    def _drop(self, lost: Dropped, **fields: Any) -> None:
        self._log("dropped", self._number, client=lost.client, stage=lost.stage, reason=lost.reason, **fields)

    def _sent(self, state: State) -> dict[str, Tensor]:
        """All that any tier is sent; what two tiers are sent under one name is the same."""
        method = self._federation.method
        return {name: value for tier in self._federation.tiers for name, value in method.dispatch(state, tier).items()}

    def _layout(self, state: State) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """The shapes of the tensors and of the counts that are summed: the changes that any tier's client can have."""
        federation, layout, use = self._federation, dict[str, list[int]](), list[int]()
        for tier in federation.tiers:
            task = Task(self._number, tier, federation.method.dispatch(state, tier))
            spec = federation.specs(task)
            layout |= {n: [*shape] for n, (shape, _) in {**spec.adapters, **spec.extras}.items() if n in task.payload}
            use = [*spec.expert_tokens[0]]
        if privacy := federation.settings.privacy:
            layout |= {COUNTS: use}
            private_limit(privacy.clip_norm, self._terms.bits, sum(torch.Size(one).numel() for one in layout.values()))
            return layout, {}
        return layout | {UTILIZATION: use, SHARES: use, LOSS: []}, {COUNTS: use, "tokens": [], "assignments": []}

    def _plain(self, sums: Sums, sent: dict[str, Tensor]) -> Contribution:
        self._check_sums(sums)
        means = {name: sums.mean(name) for name in sums.values}
        utilization, shares, loss = (means.pop(name) for name in (UTILIZATION, SHARES, LOSS))
        changed = with_delta({name: sent[name] for name in means}, sent, means)
        adapters = adapter_part(changed)
        return RoundSum(
            client="",
            weight=float(sums.weights[LOSS]),
            adapters=adapters,
            expert_tokens=sums.counts[COUNTS],
            tokens=float(sums.counts["tokens"]),
            assignments=float(sums.counts["assignments"]),
            extras={name: value for name, value in changed.items() if name not in adapters},
            loss=float(loss),
            weights={name: sums.weights[name] for name in adapters},
            mean_utilization=utilization,
            mean_shares=shares,
        )

    def _check_sums(self, sums: Sums) -> None:
        """What honest clients' sums cannot be otherwise."""
        counts, assignments = sums.counts[COUNTS], sums.counts["assignments"]
        weights = torch.stack([sums.weights[name].max() for name in sums.weights])
        wrong = (counts < 0).any() or (counts.sum(-1) != assignments).any() or (weights > sums.weights[LOSS]).any()
        if wrong or float(sums.weights[LOSS]) != sum(self._examples.values()):
            raise RoundError(
                f"round {self._number}: this is no sum of valid updates: counts of experts do not add up to the assignments, or "
                "weights to the announced examples; some client does not keep to the protocol, and nobody can see which. The "
                "checkpoint before is intact"
            )
