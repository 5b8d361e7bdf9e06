"""A client in a secure round: the protocol of secagg/ around its training. Only the masked vector of its update leaves it.

What nobody can check in a sum, the client enforces itself, and against its own run file, whatever the server asks for: that its
update is a valid answer to the task, the clip of every number or of the whole, how many examples it may weigh.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ubsmoe.client.node_config import KEYS, SHARES_OF_KEYS
from ubsmoe.client.train import ClientFailure
from ubsmoe.config import RunSettings
from ubsmoe.config.secure import FEWEST_IN_A_SUM
from ubsmoe.costs.secure import USE_BITS
from ubsmoe.messages import Task, Tensors, Update
from ubsmoe.methods.chosen import largest_weight, most_clients, secure_word, weight_bits
from ubsmoe.methods.method import Method
from ubsmoe.methods.sums import LONGEST_LOSS, LOSS, SHARES, UTILIZATION, private_vector, weighed, whole_counts
from ubsmoe.secagg.graph import needed
from ubsmoe.secagg.member import Check, Memory, Refusal, Sign, mask, offer, reveal, seal
from ubsmoe.secagg.messages import Boxes, Masked, Roster, Start, Survivors, Terms
from ubsmoe.secagg.vector import Summand, encode, step_of
from ubsmoe.seeds import generator_for
from ubsmoe.wire.codec import decode_task
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES, Packed, WireError

NOBODY = "0" * 64


@dataclass(frozen=True)
class Rules:
    """What a run file says of its secure rounds: the terms (of no round yet), and below how many clients there is no sum."""

    terms: Terms
    fewest: int


def rules_of(settings: RunSettings, method: Method | None = None) -> Rules:
    """The rules of a run.

    Args:
        settings: the run.
        method: the run's; without it the weights are taken to be whole.

    Raises:
        ConfigError: if no word is wide enough.
    """
    secure, privacy = settings.secure_aggregation, settings.privacy
    assert secure is not None
    fraction, clients = 0 if method is None else weight_bits(settings, method), most_clients(settings)
    terms = Terms(
        run="",
        round=0,
        session=NOBODY,
        threshold=secure.threshold,
        neighbours=secure.neighbours,
        clients=clients,
        max_weight=largest_weight(settings),
        word=secure_word(settings, fraction),
        bits=secure.bits,
        fraction=fraction,
        clip=privacy.clip_norm if privacy else secure.clip,
    )
    poisson = settings.clients.sampling == "poisson"  # the draw may be small
    return Rules(terms, FEWEST_IN_A_SUM if poisson else max(FEWEST_IN_A_SUM, needed(secure.threshold, clients)))


def limits_of(layout: Tensors | dict[str, list[int]], clip: float) -> dict[str, float]:
    """The largest value of each tensor of a sum."""
    own = {UTILIZATION: 1.0, SHARES: 1.0, LOSS: LONGEST_LOSS}
    return {name: own.get(name, clip) for name in layout}


def private_limit(clip_norm: float, bits: int, elements: int) -> float:
    """What a vector is clipped to so that rounding, by less than a step per number, leaves it within clip_norm.

    Raises:
        Refusal: if nothing would be left.
    """
    longest = clip_norm - step_of(clip_norm, bits) * math.sqrt(elements)
    if longest <= 0:
        raise Refusal(
            f"rounding {elements} numbers to {bits} bits may add more than privacy.clip_norm = {clip_norm:g}; raise "
            "secure_aggregation.bits"
        )
    return longest


class SecureClient:
    """One client's part in secure rounds.

    Args:
        client: its name.
        settings: the run file as this machine has it.
        memory: of the round before, as `memory` gives it.
        sign: signs this client's keys; leaves them unsigned when left out.
        check: checks the others' signatures; trusts the server to relay keys when left out.
    """

    def __init__(
        self,
        client: str,
        settings: RunSettings,
        memory: str = "",
        sign: Sign = lambda one: one,
        check: Check = lambda one: None,
    ) -> None:
        self._client, self._settings, self._rules = client, settings, rules_of(settings)
        self._memory = Memory.model_validate_json(memory) if memory else None
        self._sign, self._check = sign, check

    @property
    def memory(self) -> str:
        """What has to be kept until the next message, secrets included; empty before the first."""
        return self._memory.model_dump_json() if self._memory else ""

    def answer(self, kind: str, packed: Packed) -> Packed:
        """Answer a message that is not about training.

        Args:
            kind: KEYS, SHARES_OF_KEYS or UNMASK.
            packed: the message.

        Raises:
            Refusal: for what would tell the server more than the sum.
            WireError: if the bytes are no such message.
        """
        if kind == KEYS:
            return self._offer(Terms.read(packed.header))
        if kind == SHARES_OF_KEYS:
            self._memory, boxes = seal(self._held(), Roster.read(packed.header), self._rules.fewest, self._check)
            return Packed(boxes.bytes(), b"")
        asked = Survivors.read(packed.header)
        self._memory, revealed = reveal(self._held(), asked, self._rules.fewest)
        return Packed(revealed.bytes(), b"")

    def _held(self) -> Memory:
        if self._memory is None:
            raise Refusal(f"{self._client} has no round in progress, since its process was restarted")
        return self._memory

    def _offer(self, terms: Terms) -> Packed:
        own = self._rules.terms
        if terms.fraction not in (0, USE_BITS) or terms.word != secure_word(self._settings, terms.fraction):
            raise Refusal(f"the server sums words of {terms.word} bits, {terms.fraction} of them for weights below one")
        self._memory, public = offer(self._client, terms, own, self._memory, self._sign)
        return Packed(public.bytes(), b"")

    def expect(self, start: Start) -> None:
        """Raise Refusal, before any training, unless this message begins the work of this client's session."""
        self._held().after("sealed", start.session)

    def masked(self, start: Start, task: Task, update: Update, method: Method) -> Packed:
        """The update, clipped, as a masked vector.

        Raises:
            Refusal: if the task is another client's or round's than the keys, or its weights are not the method's.
            ClientFailure: if the update is none that may be summed.
        """
        self.expect(start)
        terms = self._held().terms
        if (task.profile.client, task.round, task.run) != (self._client, terms.round, terms.run):
            raise Refusal("the server's task is of another client, round or run than the keys of this session")
        if terms.fraction != rules_of(self._settings, method).terms.fraction:
            raise Refusal(f"the server sums weights of {terms.fraction} bits below one, which {method.name} has not")
        self._check_update(update, task.payload, method)
        counts = {} if self._settings.privacy else whole_counts(update)
        rounding = generator_for(self._settings.seed, self._client, task.round, "rounding")
        vector = encode(self._summands(update, task.payload, method), counts, start.layout, terms, rounding)
        self._memory = mask(self._held(), Boxes(session=start.session, boxes=start.boxes), vector)
        header = Masked(session=start.session, client=self._client, seconds=update.seconds)
        return Packed(header.bytes(), vector.numpy().tobytes())

    def _summands(self, update: Update, sent: Tensors, method: Method) -> dict[str, Summand]:
        terms = self._rules.terms
        if self._settings.privacy:
            whole = private_vector(update, sent, terms.clip)
            elements = sum(value.numel() for value in whole.values())
            vector = private_vector(update, sent, terms.clip, private_limit(terms.clip, terms.bits, elements))
            return {name: Summand(value, 1, terms.clip) for name, value in vector.items()}
        parts = weighed(update, sent, method.weigh)
        limits = limits_of({name: value for name, (value, _) in parts.items()}, terms.clip)
        return {name: Summand(value, weight, limits[name]) for name, (value, weight) in parts.items()}

    def _check_update(self, update: Update, sent: Tensors, method: Method) -> None:
        """What the server checks of an update that it sees."""
        floats = {
            name: value for name, value in {**update.adapters, **update.extras}.items() if value.is_floating_point()
        }
        changes = [value.double() - (sent[name].double() if name in sent else 0) for name, value in floats.items()]
        squared = sum(float(change.square().sum()) for change in changes)
        change = math.sqrt(squared / max(sum(one.numel() for one in changes), 1))
        if not change <= self._settings.rounds.max_change:
            raise ClientFailure(
                f"weights changed by {change:.3g} (root mean square), at most {self._settings.rounds.max_change:g} "
                "(rounds.max_change)"
            )
        if fault := method.fault(update):
            raise ClientFailure(fault)


def start_message(session: str, boxes: dict[str, str], task: Packed, layout: dict[str, list[int]]) -> Packed:
    """The message that begins a client's work."""
    header = Start(session=session, boxes=boxes, task=task.header.decode(), layout=layout)
    return Packed(header.bytes(), task.tensors)


def task_in(start: Start, packed: Packed) -> Task:
    """The task in a message that begins a client's work. Raises WireError if there is none."""
    return decode_task(Packed(start.task.encode(), packed.tensors), MAX_MESSAGE_BYTES)


def vector_in(packed: Packed, size: int, dtype: torch.dtype) -> Tensor:
    """The masked vector of so many words. Raises WireError for any other number of bytes."""
    if len(packed.tensors) != size * dtype.itemsize:
        raise WireError(f"a vector of {len(packed.tensors)} bytes, expected {size * dtype.itemsize}")
    words = np.frombuffer(packed.tensors, dtype={4: np.int32, 8: np.int64}[dtype.itemsize])
    return torch.from_numpy(words.copy())
