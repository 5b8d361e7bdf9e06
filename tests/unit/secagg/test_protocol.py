"""The protocol alone: sums, dropouts, and every question that a client refuses to answer."""

import hashlib
import itertools
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.errors import RoundError, UserError
from ubsmoe.secagg.graph import holders, needed
from ubsmoe.secagg.keys import agree, lock, new_secret, public_of, unlock
from ubsmoe.secagg.masks import add_mask
from ubsmoe.secagg.member import Memory, Refusal, mask, offer, reveal, seal
from ubsmoe.secagg.messages import Boxes, Revealed, Roster, Start, Survivors, Terms
from ubsmoe.secagg.shares import PRIME, combine, split
from ubsmoe.secagg.tally import Tally
from ubsmoe.wire.packed import WireError

FIVE = ("a", "b", "c", "d", "e")


def terms(names: Collection[str] = FIVE, **changes: Any) -> Terms:
    given: dict[str, Any] = {
        "run": "run", "round": 1, "session": "5" * 64, "threshold": 0.6, "neighbours": None, "clients": len(names),
        "max_weight": 10, "word": 32, "bits": 16, "fraction": 0, "clip": 0.5,
    }  # fmt: skip
    return Terms(**given | changes)


class Session:
    """A server and clients; each step can be looked at and bent."""

    def __init__(self, names: Collection[str] = FIVE, fewest: int = 3, **changes: Any) -> None:
        self.terms, self.fewest = terms(names, **changes), fewest
        self.tally = Tally(self.terms, fewest)
        pairs = {name: offer(name, self.terms, self.terms, None, lambda one: one) for name in names}
        self.memory: dict[str, Memory] = {name: memory for name, (memory, _) in pairs.items()}
        self.offers = {name: one for name, (_, one) in pairs.items()}

    def seal(self, gone: Collection[str] = (), check: Callable[..., None] = lambda one: None) -> None:
        roster = self.tally.roster(self.offers)
        boxes = {}
        for name in self.offers.keys() - set(gone):
            self.memory[name], boxes[name] = seal(self.memory[name], roster, self.fewest, check)
        self.boxes = self.tally.deliver(boxes)

    def mask(self, vectors: dict[str, torch.Tensor]) -> None:
        for name, vector in vectors.items():
            boxes = Boxes(session=self.terms.session, boxes=self.boxes[name])
            self.memory[name] = mask(self.memory[name], boxes, vector)
            self.tally.add(name, vector)

    def reveal(self, gone: Collection[str] = ()) -> dict[str, Revealed]:
        answers = {}
        for name, asked in self.tally.survivors().items():
            if name not in gone:
                self.memory[name], answers[name] = reveal(self.memory[name], asked, self.fewest)
        return answers


def vectors(names: Collection[str], dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
    low, high = (-(2**31), 2**31) if dtype == torch.int32 else (-(2**62), 2**62)
    draws = {name: torch.Generator().manual_seed(ord(name[0]) + len(name)) for name in names}
    return {name: torch.randint(low, high, (7,), generator=draw, dtype=dtype) for name, draw in draws.items()}


DROPOUTS = [
    ((), (), ()),
    (("b",), (), ()),
    ((), ("b",), ()),
    ((), ("b", "e"), ()),
    ((), (), ("b", "e")),
    (("a",), ("d",), ()),
    ((), ("d",), ("b",)),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("before", "while_training", "at_the_end"), DROPOUTS)
def test_the_sum_is_exactly_that_of_those_who_answered(
    before: tuple[str, ...], while_training: tuple[str, ...], at_the_end: tuple[str, ...], dtype: torch.dtype
) -> None:
    session = Session(word=32 if dtype == torch.int32 else 64)
    session.seal(before)
    values = vectors([name for name in FIVE if name not in (*before, *while_training)], dtype)
    plain = {name: value.clone() for name, value in values.items()}
    session.mask(values)
    assert all(not torch.equal(values[name], plain[name]) for name in values)
    total = session.tally.total(session.reveal(at_the_end))
    assert torch.equal(total, sum(plain.values()))  # type: ignore[arg-type]


def test_with_few_neighbours_it_is_the_same() -> None:
    names = [f"{chr(97 + i)}{i}" for i in range(12)]
    session = Session(names, neighbours=4, fewest=8, threshold=0.51)
    session.seal()
    assert {len(memory.holders) for memory in session.memory.values()} == {5}
    values = vectors(names[:-1])
    expected = sum(value.clone() for value in values.values())
    session.mask(values)
    assert torch.equal(session.tally.total(session.reveal()), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("gone", [("a", "b", "c"), ("a", "b", "c", "d")])
def test_below_the_threshold_there_is_no_sum_and_one_sentence(gone: tuple[str, ...]) -> None:
    for step in ("seal", "mask", "reveal"):
        session = Session()
        with pytest.raises(
            RoundError, match=r"^round 1: .* needs 3|^round 1: \d clients gave shares of a, 3 are needed"
        ):
            session.seal(gone if step == "seal" else ())
            session.mask(vectors([name for name in FIVE if step != "mask" or name not in gone]))
            session.tally.total(session.reveal(gone))


def masked_session() -> Session:
    session = Session()
    session.seal()
    session.mask(vectors(FIVE[:-1]))
    return session


ALL_BUT_E = ["a", "b", "c", "d"]
QUESTIONS = {
    "one node twice": (["a", "b", "b", "c"], ["e"], "names one client twice"),
    "both kinds of share": (["a", "b", "c"], ["b", "e"], "names one client twice"),
    "its own key": (["b", "c", "d"], ["a", "e"], "says that this client vanished"),
    "neither of its own": (["b", "c", "d"], ["e"], "says that this client vanished"),
    "a stranger": ([*ALL_BUT_E, "x"], ["e"], "a share of x, which this client does not hold"),
    "a sum of one": (["a"], ["b", "c", "d", "e"], "a sum of 1 clients, 3 are needed"),
    "a sum of two": (["a", "b"], ["e"], "a sum of 2 clients, 3 are needed"),
}


@pytest.mark.parametrize(("survived", "vanished", "reason"), QUESTIONS.values(), ids=QUESTIONS)
def test_a_client_refuses_a_question_that_would_unmask_one_update(
    survived: list[str], vanished: list[str], reason: str
) -> None:
    memory = masked_session().memory["a"]
    with pytest.raises(Refusal, match=reason):
        reveal(memory, Survivors(session="5" * 64, survived=survived, vanished=vanished), 3)


def test_a_client_answers_once_and_in_order() -> None:
    session = masked_session()
    asked = session.tally.survivors()["a"]
    memory, _ = reveal(session.memory["a"], asked, 3)
    other = asked.model_copy(update={"survived": ["a", "c", "d"], "vanished": ["b", "e"]})
    with pytest.raises(Refusal, match="expected 55555555 once it is 'revealed'"):
        reveal(memory, other, 3)
    with pytest.raises(Refusal, match="the session is 99999999"):
        reveal(session.memory["a"], asked.model_copy(update={"session": "9" * 64}), 3)
    with pytest.raises(Refusal, match="once it is 'masked'"):
        mask(session.memory["a"], Boxes(session="5" * 64, boxes={}), torch.zeros(2, dtype=torch.int32))


def test_no_two_answers_of_the_others_give_both_secrets_of_one_client() -> None:
    """A server that tells some that b answered and others that it vanished gets too few shares of each kind."""
    session = masked_session()
    seeds, keys = 0, 0
    for turn, name in enumerate(ALL_BUT_E):
        told_gone = turn % 2 == 0 and name != "b"
        survived = [one for one in ALL_BUT_E if one != "b" or not told_gone]
        vanished = ["b", "e"] if told_gone else ["e"]
        _, answer = reveal(session.memory[name], Survivors(session="5" * 64, survived=survived, vanished=vanished), 3)
        seeds, keys = seeds + ("b" in answer.seeds), keys + ("b" in answer.keys)
    assert min(seeds, keys) < session.memory["a"].needed == 3


@pytest.mark.parametrize(
    "change",
    [{"threshold": 0.2}, {"clip": 50.0}, {"bits": 30}, {"max_weight": 10**6}, {"clients": 2}, {"neighbours": 2}],
    ids=str,
)
def test_a_client_takes_no_terms_but_those_of_its_own_run_file(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(Refusal, match=f"the server's {name} is"):
        offer("a", terms(**change), terms(), None, lambda one: one)


def repeated(before: Session, names: Collection[str]) -> Session:
    """The same clients asked for round 1 again, of whom these answer."""
    again = Session(session="7" * 64)
    pairs = {name: offer(name, again.terms, again.terms, before.memory[name], lambda one: one) for name in FIVE}
    again.memory = {name: memory for name, (memory, _) in pairs.items()}
    again.offers = {name: one for name, (_, one) in pairs.items()}
    again.seal()
    again.mask(vectors(names))
    return again


def test_a_round_that_broke_off_is_repeated_with_new_secrets() -> None:
    first = masked_session()
    again = repeated(first, FIVE[1:])  # nothing was revealed, so others may answer now
    assert again.offers["a"].mask_key != first.offers["a"].mask_key
    assert again.tally.total(again.reveal()) is not None
    for kind in ("mask_key", "seed"):
        assert getattr(first.memory["a"], kind) == ""  # and the first try can no longer be unmasked


def test_a_round_that_was_summed_is_repeated_over_the_same_clients_alone() -> None:
    """Of two sums that differ in one client the difference is its update."""
    first = masked_session()
    total = first.tally.total(first.reveal())
    same = repeated(first, ALL_BUT_E)
    assert torch.equal(same.tally.total(same.reveal()), total)
    for names in (FIVE, "abc"):
        with pytest.raises(
            Refusal, match=f"round 1 has been summed over 4 clients before and would now be over {len(names)}"
        ):
            repeated(first, names).reveal()


def test_no_round_before_the_last_is_asked_for() -> None:
    session = masked_session()
    session.reveal()
    with pytest.raises(Refusal, match="asks for round 0 after round 1"):
        offer("a", terms(round=0), terms(), session.memory["a"], lambda one: one)
    later, _ = offer("a", terms(round=2), terms(), session.memory["a"], lambda one: one)
    assert later.summed == []
    offer("a", terms(round=0, run="another"), terms(), session.memory["a"], lambda one: one)


def bent(session: Session, how: str) -> Roster:
    offers = list(session.offers.values())
    other = offers[0].model_copy(update={"mask_key": public_of(new_secret()).hex()})
    lists = {
        "one client twice": [*offers, offers[1]],
        "one key twice": [*offers[:4], offers[4].model_copy(update={"mask_key": offers[3].mask_key})],
        "two clients": offers[:2],
        "without itself": offers[1:],
        "another key for itself": [other, *offers[1:]],
        "keys of another session": [*offers[:4], offers[4].model_copy(update={"session": "9" * 64})],
    }
    return Roster(session="5" * 64, offers=lists[how])


ROSTERS = {
    "one client twice": "names one client twice",
    "one key twice": "names one client twice",
    "two clients": "names 2 clients, a sum needs 3",
    "without itself": "other keys for this client than its own",
    "another key for itself": "other keys for this client than its own",
    "keys of another session": "the keys of e are of another session",
}


@pytest.mark.parametrize(("how", "reason"), ROSTERS.items(), ids=ROSTERS)
def test_a_client_refuses_a_roster_that_is_bent(how: str, reason: str) -> None:
    session = Session()
    with pytest.raises(Refusal, match=reason):
        seal(session.memory["a"], bent(session, how), 3, lambda one: None)


def test_boxes_open_for_their_receiver_alone_and_a_changed_one_is_refused() -> None:
    session = Session()
    session.seal()
    boxes = dict(session.boxes["a"])
    for wrong in ({**boxes, "b": boxes["c"]}, {**boxes, "b": "00" + boxes["b"][2:]}, {**boxes, "b": boxes["b"][:40]}):
        with pytest.raises(Refusal, match="the box from b does not open"):
            mask(session.memory["a"], Boxes(session="5" * 64, boxes=wrong), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(Refusal, match="a box from x, who shares no mask"):
        mask(session.memory["a"], Boxes(session="5" * 64, boxes={"x": "00"}), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(Refusal, match="2 of 5 clients shared their secrets, 3 are needed"):
        mask(session.memory["a"], Boxes(session="5" * 64, boxes={"b": boxes["b"]}), torch.zeros(2, dtype=torch.int32))


def test_a_client_that_leaves_somebody_out_or_gives_false_shares_is_noticed() -> None:
    session = Session()
    roster = session.tally.roster(session.offers)
    _, boxes = seal(session.memory["a"], roster, 3, lambda one: None)
    assert not session.tally.lacks("a", boxes)
    assert session.tally.lacks("a", boxes.model_copy(update={"boxes": {"b": boxes.boxes["b"]}}))
    liar = masked_session()
    answers = liar.reveal()
    false = {**answers["a"].seeds, "b": "00" * 66}
    answers["a"] = answers["a"].model_copy(update={"seeds": false})
    with pytest.raises(RoundError, match="shares of"):
        liar.tally.total(answers)


@given(st.integers(1, 6), st.integers(0, 5), st.binary(min_size=32, max_size=32))
def test_any_threshold_shares_give_the_secret(threshold: int, more: int, secret: bytes) -> None:
    shares = split(secret, threshold, threshold + more)
    for chosen in itertools.combinations(range(1, len(shares) + 1), threshold):
        assert combine({x: shares[x - 1] for x in chosen}) == secret


def test_fewer_shares_fit_every_secret_alike() -> None:
    """For any two of three needed shares and any secret there is a third share that gives just this secret."""
    one, two, _ = split(b"\x01" * 32, threshold=3, count=3)
    for guess in (b"\x00" * 32, b"\x7f" * 32, hashlib.sha256(b"x").digest()):
        a, b, s = (int.from_bytes(x, "big") for x in (one, two, guess))
        third = (s - 3 * a + 3 * b) % PRIME  # of f(0) = 3 f(1) - 3 f(2) + f(3)
        assert combine({1: one, 2: two, 3: third.to_bytes(66, "big")}) == guess


def test_masks_come_from_a_256_bit_key_and_look_like_noise() -> None:
    """ChaCha20 of RFC 8439, A.1, test vector 1; no two keys that agree in 32 bits give one mask."""
    zeros = torch.zeros(8, dtype=torch.int32)
    add_mask(zeros, bytes(32), 1)
    assert zeros.numpy().tobytes().hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    masks = []
    for last in (b"\x00" * 4, b"\x01" * 4):
        words = torch.zeros(20_000, dtype=torch.int64)
        add_mask(words, b"\x05" * 28 + last, 1)
        masks.append(words.double() / 2**63)
    assert abs(float(masks[0].mean())) < 0.02 and abs(float(masks[0].std()) - 3**-0.5) < 0.01
    assert abs(float(torch.corrcoef(torch.stack(masks))[0, 1])) < 0.03


def test_keys_agree_on_both_sides_and_differ_by_purpose_and_session() -> None:
    ours, theirs = new_secret(), new_secret()
    key = agree(ours, public_of(theirs), "mask", "s")
    assert key == agree(theirs, public_of(ours), "mask", "s")
    assert len({key, agree(ours, public_of(theirs), "box", "s"), agree(ours, public_of(theirs), "mask", "t")}) == 3
    assert unlock(key, lock(key, b"x", "a b"), "a b") == b"x"
    with pytest.raises(ValueError, match="does not open"):
        unlock(key, lock(key, b"x", "a b"), "b a")


@given(st.floats(0.51, 1.0), st.integers(1, 300))
def test_what_is_needed_is_more_than_half_and_no_more_than_all(threshold: float, count: int) -> None:
    assert count < 2 * needed(threshold, count) and needed(threshold, count) <= count


def test_neighbours_are_mutual_and_follow_from_the_keys() -> None:
    keys = {f"c{i}": f"{i:064d}" for i in range(20)}
    graph = holders(keys, 6)
    assert all(len(group) == 7 and name in group for name, group in graph.items())
    assert all(name in graph[other] for name, group in graph.items() for other in group)
    assert graph != holders(keys | {"c0": "9" * 64}, 6)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (Survivors, b'{"session":"' + b"5" * 64 + b'","survived":["a"],"vanished":[],"both":[]}'),
        (Boxes, b'{"session":"' + b"5" * 64 + b'","boxes":{"a":"00","a":"01"}}'),
        (Boxes, b'{"session":"short","boxes":{}}'),
        (Start, b"[" * 100_000),
        (Survivors, b" " * (2 << 20)),
    ],
)
def test_bytes_that_are_no_such_message_are_a_wire_error(kind: Any, header: bytes) -> None:
    with pytest.raises(WireError):
        kind.read(header)


def test_a_refusal_is_a_users_error() -> None:
    assert issubclass(Refusal, UserError)
