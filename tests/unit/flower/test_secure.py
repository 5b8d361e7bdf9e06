"""Secure rounds over a Grid: the bits of the local engine, signed keys, and what becomes of a server or a node that lies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from ubsmoe.config import load_run
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.client import client_app
from ubsmoe.engines.flower.keys import make_keys
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.engines.flower.server import FlowerEngine
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import RoundError, UserError
from ubsmoe.methods.state import pack
from ubsmoe.secagg.keys import new_secret, public_of
from ubsmoe.secagg.member import Refusal
from ubsmoe.secagg.messages import Offer, Roster, Survivors, Terms
from ubsmoe.secagg.signing import check_with, sign_with
from ubsmoe.server.federation import build_federation, build_server
from ubsmoe.server.rounds import one_round
from ubsmoe.server.start import noise_key, start_state
from ubsmoe.wire.packed import Packed, disclose, enclose
from unit.engines.loop_grid import LoopGrid, as_process

OUT = {"out": "unused", "join-seconds": 1, "clients.count": 5, "secure_aggregation.threshold": 0.6}
NODES = 5


@pytest.fixture(autouse=True)
def _process() -> None:
    as_process()


class Site:
    """A server and five machines with a key and a client each."""

    def __init__(self, run_file: Path, keys: Path, changes: dict[str, Any], **identity: Any) -> None:
        make_keys(keys, ["localhost"], [f"client-{i}" for i in range(NODES)])
        own = {"peer-keys": str(keys), **identity}
        nodes = {
            70 + i: {"partition-id": i, "num-partitions": NODES, "signing-key": str(keys / f"client-{i}"), **own}
            for i in range(NODES)
        }
        config = OUT | changes
        self.server = build_server(read_app(run_file, config))
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.now = 0.0
        self.grid = LoopGrid(client_app(run_file), nodes, config)
        self.engine = FlowerEngine(self.grid, self.server, lambda line: None, self.clock)
        self.engine.join(9)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def round(self, number: int = 1, state: Any = None) -> Any:
        def log(event: str, number: int, **fields: Any) -> None:
            self.said.append((event, fields))

        settings = self.server.settings
        return one_round(self.server, self.engine, state or start_state(self.server), number, log, noise_key(settings))

    @property
    def dropped(self) -> dict[str, str]:
        return {fields["client"]: fields["reason"] for event, fields in self.said if event == "dropped"}


@pytest.fixture
def site(tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path) -> Callable[..., Site]:
    table = tiny_run | {"threads": 1, "train": {"rounds": 2, "local_steps": 1, "batch_size": 4}}
    run_file = write_toml(table)
    return lambda changes={}, **identity: Site(run_file, tmp_path / "keys", changes, **identity)


PRIVATE = {"privacy.noise_multiplier": 0.3, "privacy.clip_norm": 0.1, "privacy.seed": 7, "secure_aggregation.bits": 24}


@pytest.mark.parametrize("changes", [{}, PRIVATE, {"method.name": "flame"}], ids=["plain", "private", "flame"])
def test_two_signed_rounds_give_the_bits_of_the_local_engine(
    site: Callable[..., Site], changes: dict[str, Any]
) -> None:
    here = site(changes)
    local = build_federation(here.server.settings)
    engine = LocalEngine(local.trainer, local.examples, local.clients)
    theirs = ours = start_state(local)
    for number in (1, 2):
        theirs = here.round(number, theirs)
        ours = one_round(local, engine, ours, number, lambda *_, **__: None, noise_key(local.settings))
    assert not here.dropped and pack(ours).keys() == pack(theirs).keys()
    assert all(torch.equal(value, pack(theirs)[name]) for name, value in pack(ours).items())


def lie(site: Site, kind: str, change: Callable[[bytes], bytes], nodes: tuple[int, ...]) -> None:
    """The server's message of this kind to these nodes is another one."""

    def push(kind_: str, node: int, packed: Packed, group: str, seconds: float | None) -> str | None:
        if kind_ == kind and node in nodes:
            inner, (client,) = disclose(packed, "client")
            packed = enclose(Packed(change(inner.header), inner.tensors), client=client)
        return honest(kind_, node, packed, group, seconds)

    honest = site.engine._push
    site.engine._push = push  # type: ignore[method-assign]


def unsigned_key(header: bytes) -> bytes:
    """A roster in which the server has put a mask key of its own for client-2."""
    roster = Roster.read(header)
    own = public_of(new_secret()).hex()
    offers = [one.model_copy(update={"mask_key": own}) if one.client == "client-2" else one for one in roster.offers]
    return roster.model_copy(update={"offers": offers}).bytes()


def edited(kind: Any, **changes: Any) -> Callable[[bytes], bytes]:
    return lambda header: kind.read(header).model_copy(update=changes).bytes()


def twice(header: bytes) -> bytes:
    asked = Survivors.read(header)
    return asked.model_copy(update={"vanished": [*asked.vanished, asked.survived[0]]}).bytes()


LIES = {
    "a key of its own": (
        "query.secure_shares",
        unsigned_key,
        "the keys of client-2 are not signed by the key client-2.pub",
    ),
    "another threshold": (
        "query.secure_keys",
        edited(Terms, threshold=0.01),
        "the server's threshold is 0.01, this machine's 0.6",
    ),
    "another clip": ("query.secure_keys", edited(Terms, clip=9.0), "the server's clip is 9.0, this machine's 0.5"),
    "coarser numbers": ("query.secure_keys", edited(Terms, bits=8), "the server's bits is 8, this machine's 16"),
    "another word": ("query.secure_keys", edited(Terms, word=64), "sums words of 64 bits"),
    "an old round": ("query.secure_keys", edited(Terms, round=0), "asks for round 0 after round 1"),
    "one node in both lists": ("query.secure_unmask", twice, "names one client twice"),
}


@pytest.mark.parametrize(("kind", "change", "reason"), LIES.values(), ids=LIES)
def test_a_client_refuses_a_server_that_lies_and_the_others_go_on(
    kind: str, change: Callable[[bytes], bytes], reason: str, site: Callable[..., Site]
) -> None:
    here = site()
    state = here.round(1)
    lie(here, kind, change, (70, 71))
    here.round(2, state)
    assert set(here.dropped) == {"client-0", "client-1"}
    assert all(reason in said for said in here.dropped.values())


def test_if_all_are_lied_to_there_is_no_round(site: Callable[..., Site]) -> None:
    here = site()
    lie(here, "query.secure_shares", unsigned_key, tuple(range(70, 75)))
    with pytest.raises(RoundError, match="round 1: 0 of 5 clients are left after the exchange of shares"):
        here.round()


def test_a_node_without_keys_takes_no_part_unless_it_says_that_this_is_a_trial(site: Callable[..., Site]) -> None:
    here = site()
    for node in (72, 73):
        config = here.grid.nodes[node]
        del config["signing-key"], config["peer-keys"]
    here.grid.nodes[73]["unsigned"] = True  # the others do not take its keys
    with pytest.raises(RoundError):
        here.round()
    assert "[secure_aggregation] needs signing-key" in here.dropped["client-2"]
    assert "the keys of client-3 are not signed by client-3" in here.dropped["client-0"]


def test_trials_without_keys_agree_among_themselves(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path
) -> None:
    here = Site(write_toml(tiny_run), tmp_path / "keys", {"train.local_steps": 1})
    for config in here.grid.nodes.values():
        del config["signing-key"], config["peer-keys"]
        config["unsigned"] = True
    here.round()
    assert not here.dropped


FAULTS: dict[str, tuple[str, Callable[..., list[Message]], str]] = {
    "is silent in training": ("train.secure_train", lambda m, a: [], "no answer within rounds.deadline_seconds = 40 s"),
    "is silent at the end": ("query.secure_unmask", lambda m, a: [], "no answer within 120 s"),
    "sends half a vector": ("train.secure_train", lambda m, a: [half(a(), m)], "a vector of"),
    "sends noise for keys": (
        "query.secure_keys", lambda m, a: [Message(to_record(Packed(b"{", b"")), reply_to=m)], "Offer: Expecting property name",
    ),
    "speaks for another": ("query.secure_keys", lambda m, a: [renamed(a(), m)], "keys are of another client"),
}  # fmt: skip


def half(answer: Message, message: Message) -> Message:
    packed = from_record(answer.content)
    return Message(to_record(Packed(packed.header, packed.tensors[: len(packed.tensors) // 2])), reply_to=message)


def renamed(answer: Message, message: Message) -> Message:
    offer = Offer.read(from_record(answer.content).header).model_copy(update={"client": "client-0"})
    return Message(to_record(Packed(offer.bytes(), b"")), reply_to=message)


@pytest.mark.parametrize(("kind", "fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_what_a_bad_node_does_drops_its_client_and_nobody_else(
    kind: str, fault: Any, reason: str, site: Callable[..., Site]
) -> None:
    here = site({"rounds.deadline_seconds": 40})
    here.grid.faulty, here.grid.faults = kind, {73: fault}
    here.round()
    assert list(here.dropped) == ["client-3"] and reason in here.dropped["client-3"]


def test_signatures(tmp_path: Path) -> None:
    """A file of the client's own name is the only key that speaks for it; clients without one have any key of the folder."""
    make_keys(tmp_path, ["localhost"], ["a", "node-0"])
    make_keys(tmp_path / "strangers", ["localhost"], ["a", "x"])
    check = check_with(tmp_path)

    def offered(client: str) -> Offer:
        return Offer(session="1" * 64, client=client, mask_key="2" * 64, box_key="3" * 64, commitment="4" * 64)

    check(sign_with(tmp_path / "a")(offered("a")))
    check(sign_with(tmp_path / "node-0")(offered("client-7")))
    good = sign_with(tmp_path / "a")(offered("a"))
    bad = [
        offered("a"),
        sign_with(tmp_path / "node-0")(offered("a")),
        sign_with(tmp_path / "strangers/a")(offered("a")),
        sign_with(tmp_path / "strangers/x")(offered("client-7")),
        good.model_copy(update={"mask_key": "5" * 64}),
        good.model_copy(update={"session": "6" * 64}),
        good.model_copy(update={"client": "b"}),
        good.model_copy(update={"client": "b", "signer": "../a"}),
    ]
    for one in bad:
        with pytest.raises(Refusal, match="are not signed by"):
            check(one)
    with pytest.raises(UserError, match=r"signing-key: .*gone holds no private key"):
        sign_with(tmp_path / "gone")
    with pytest.raises(UserError, match=r"peer-keys: .* is no folder"):
        check_with(tmp_path / "gone")


def test_the_same_run_file_is_read_by_both_sides(tiny_run: dict[str, Any], write_toml: Callable[..., Path]) -> None:
    run_file = write_toml(tiny_run | {"secure_aggregation": {"bits": 20}})
    assert load_run(run_file).secure_aggregation == read_app(run_file, {"out": "x"}).secure_aggregation
