"""M: what one client can do to everybody: with bytes, numbers, weight, places, a large change, words, and silence."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from replies import measured
from rich.console import Console

from fault_cases.matrix import BOUNDED, DROPPED, REFUSED, Row, judge
from fault_cases.round_of_five import A, Answers, Round, blob, counts, field
from ubsmoe.config import parse_run
from ubsmoe.engines.flower.roster import SILENT_ROUNDS, Roster
from ubsmoe.engines.processes import Died, ProcessPool
from ubsmoe.errors import printable
from ubsmoe.messages import Announcement, Reply, Update
from ubsmoe.methods import build
from ubsmoe.report.console import RunConsole
from ubsmoe.report.page import report_html
from ubsmoe.report.plain import csv_row, markdown_cell
from ubsmoe.report.series import series
from ubsmoe.server.federation import Federation
from ubsmoe.server.robust import most_examples
from ubsmoe.storage.json_text import decode_json, encode_json
from ubsmoe.storage.record import RunRecord
from ubsmoe.wire.codec import Packed, WireError, decode_announcements

Spoil = Callable[[Packed], Packed]
GOES_ON, FEW_LINES, SHOWN = "goes on, the others hold their places", "a few lines", "shown as it is, obeyed by nobody"


def malice(world: Round, quick: bool) -> Iterator[Row]:
    """All of M."""
    yield from declared_shapes(world)
    yield from failures(world)
    yield from own_numbers(world)
    yield from changes(world)
    yield from ranges(world)
    yield from places(world)
    yield from words()
    yield from figures()
    yield hung_worker()
    record = measured(30 if quick else 1000, seed=1)
    drops = sum(record["outcomes"].get(stage, 0) for stage in ("wire", "validation"))
    peak = record["largest_peak_bytes"] - record["declared_bytes"]
    declared = f"{record['replies']} typed drops, peak within the task's size + 64 MiB"
    said = f"{drops} drops, peak {peak / 2**20:+.0f} MiB of the task's size"
    yield judge("M", "generated replies", declared, drops == record["replies"] and peak <= 64 << 20, said)


def from_last(world: Round, name: str, spoil: Spoil, declared: str = DROPPED) -> Row:
    """The fifth client's answer is spoiled; the next state must be what the other four give."""
    state, dropped = world.receive([*world.packed[:-1], ("client-4", spoil(world.packed[-1][1]))])
    contained = world.is_mean_of_others(state) and [lost.client for lost in dropped] == ["client-4"]
    return judge("M", name, declared, contained, dropped[0].reason if dropped else "")


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """The safetensors header replaced, the tensors as they were."""

    def spoil(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        changed = change(json.loads(data[8 : 8 + length]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return blob(spoil)


def entry(**fields: Any) -> Spoil:
    return header(lambda found: found | {A: {**found[A], **fields}})


def declared_shapes(world: Round) -> Iterator[Row]:
    """A1 and A2: little said, much meant."""
    empty = {"dtype": "F32", "shape": [0, 2**20, 2**10], "data_offsets": [0, 0]}
    mask = {"dtype": "BOOL", "shape": [2**40], "data_offsets": [0, 0]}
    cases = {
        "a zero size beside 2^31": entry(shape=[0, 2**31, 2**31, 2]),
        "2^52 elements": entry(shape=[2**52]),
        "2^31 to the fourth": entry(shape=[2**31] * 4),
        "a size of 40 digits": entry(shape=[10**40]),
        "no size at all": entry(shape=[]),
        "offsets past the end": entry(data_offsets=[0, 2**52]),
        "a mask of 2^40 experts": header(lambda found: found | {A.replace("adapters", "experts"): mask}),
        "4,000 empty tensors of 4 GiB": header(lambda found: found | {f"adapters.x{i}": empty for i in range(4000)}),
        "a tensor under a name nobody asked for": header(lambda found: found | {"extras.phi": empty}),
        "50,000 fields of a tensor": header(lambda found: found | {A: dict.fromkeys(map(str, range(50_000)), 0)}),
        "a header half a million deep": header(lambda found: b"[" * 500_000),
        "a number of 900,000 digits": header(lambda found: b'{"x":' + b"9" * 900_000 + b"}"),
        "60,000 fields beside the tensors": lambda packed: replace(
            packed, header=json.dumps(json.loads(packed.header) | {str(i): 0 for i in range(60_000)}).encode()
        ),
    }
    for name, spoil in cases.items():
        yield from_last(world, name, spoil)


class Failing:
    """An engine whose last update makes the server's own check of it fail."""

    def __init__(self, world: Round, error: BaseException) -> None:
        self._world, self._error = world, error

    def clients(self) -> Any:
        """The five."""
        return self._world.profiles

    def exchange(self, tasks: Iterable[Any]) -> Iterator[Reply]:
        """Four good ones; then one of which a tensor cannot be looked at."""
        list(tasks)
        yield from self._world.honest[:-1]
        error = self._error

        class Odd(dict[str, torch.Tensor]):
            def keys(self) -> Any:
                raise error

        yield replace(self._world.honest[-1], adapters=Odd())


def failures(world: Round) -> Iterator[Row]:
    """A1: whatever Python makes of an update is that client's drop."""
    for error in (
        MemoryError(),
        RuntimeError("strides"),
        OverflowError("large"),
        RecursionError("deep"),
        KeyError("x"),
    ):
        state, dropped = world.through(Failing(world, error))
        reason = dropped[0].reason if dropped else ""
        yield judge("M", f"{type(error).__name__} while checking it", DROPPED, world.is_mean_of_others(state), reason)


def own_numbers(world: Round) -> Iterator[Row]:
    """A3: what a client says of itself."""
    for name, spoil in {
        "loss 1e300": field("loss", 1e300),
        "loss -1": field("loss", -1.0),
        "1e300 seconds": field("seconds", 1e300),
        "2^52 tokens": lambda packed: field("tokens", 2**52)(field("assignments", 2**53 - 2)(packed)),
        "assignments without tokens": field("tokens", 1),
        "counts of 2^60": counts([2**60, -(2**60), 20, 0, 0, 0]),
    }.items():
        yield from_last(world, name, spoil)
    vain = replace(world.profiles[-1], num_examples=2**52)
    profiles = [*world.profiles[:-1], vain]
    most = most_examples(profiles, 16.0)
    boast = replace(world.honest[-1], num_examples=2**52)
    world.through(Answers(profiles, [*world.honest[:-1], boast]), parse_run({"clients": {"count": 5}}))
    declared = "weighs at most 16 medians, and the run says who has most of the weight"
    yield judge("M", "2^52 examples", declared, most == 16 * 12 and world.warned == ["client-4"], f"{most:g} examples")


def changed(world: Round, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Spoil:
    """The fifth client's change of weights replaced."""
    liar, sent = world.honest[-1], world.state.adapters
    moved = {name: sent[name] + change(name, value - sent[name]) for name, value in liar.adapters.items()}
    return lambda packed: world.encode(replace(liar, adapters=moved))


def changes(world: Round) -> Iterator[Row]:
    """A5: a run file that says nothing."""
    yield from_last(world, "x10 of everything", changed(world, lambda _, d: 10 * d))
    yield from_last(world, "x30 of one tensor", changed(world, lambda n, d: 30 * d if n in A else d))

    def spike(name: str, change: torch.Tensor) -> torch.Tensor:
        change = change.clone()
        if name in A:
            change[1, 2, 3] = 4.0
        return change

    yield from_last(world, "one weight of 4", changed(world, spike))
    settings = parse_run({"clients": {"count": 5}, "rounds": {"max_ratio": 3.0}})
    flipped = world.decode("client-4", changed(world, lambda _, d: -4 * d)(world.packed[-1][1]))
    assert isinstance(flipped, Update)
    run = world.federation(settings).run_id
    answers: list[Reply] = [replace(one, run=run) for one in (*world.honest[:-1], flipped)]
    state, dropped = world.through(Answers(world.profiles, answers), settings)
    reason = dropped[0].reason if dropped else ""
    yield judge("M", "sign flip x4 at max_ratio 3", DROPPED, world.is_mean_of_others(state), reason)
    state, dropped = world.through(Answers(world.profiles, [replace(one) for one in world.honest]))
    yield judge("M", "nobody lies", BOUNDED, not dropped, "no drop")


def ranges(world: Round) -> Iterator[Row]:
    """A5: every extra in the range that its method declares."""
    cases = {
        "FLAME's scale of -24": ("flame", {}, "scale.4", -24.0),
        "FLAME's scale of 1e6": ("flame", {}, "scale.4", 1e6),
        "HFedMoE's importance of 7": ("hfedmoe", {}, "importance", 7.0),
        "HFedMoE's usage below 0": ("hfedmoe", {}, "usage", -0.1),
        "a trained phi of 9": ("ubsmoe", {"dmr": {"phi": "trained"}}, "phi", 9.0),
    }
    for name, (method, settings, extra, value) in cases.items():
        low, high = build(method, world.shape, settings).extras_range(extra)
        yield judge("M", name, DROPPED, not low <= value <= high, f"expected {low:g} to {high:g}")


class Places:
    """A run of eight places, and who asks for them."""

    def __init__(self, world: Round, online: Sequence[int]) -> None:
        self.said: list[str] = []
        federation: Federation = world.federation(parse_run({"clients": {"count": 8}}))
        self.roster = Roster(federation, self.said.append)
        self.see(online)

    def see(self, online: Sequence[int]) -> None:
        """These nodes are online."""
        self.roster.see(dict.fromkeys(online, ""))

    def ask(self, node: int, *clients: str) -> None:
        """A node announces these clients."""
        self.roster.announce(node, [Announcement(client, 10, 1.0) for client in clients])

    def held(self, node: int) -> int:
        """How many places a node has."""
        return sum(self.roster.node_of(profile.client) == node for profile in self.roster.here())


def places(world: Round) -> Iterator[Row]:
    """A4 and A8: places of a run on Flower, and what is said about who asks for them."""
    run = Places(world, [1, 2, 3, 4])
    run.ask(1, *(f"client-{i}" for i in range(8)))
    for node in (2, 3, 4):
        run.ask(node, f"n{node}-a", f"n{node}-b")
    yield judge("M", "one node announces every client", GOES_ON, [run.held(node) for node in (1, 2, 3, 4)] == [2] * 4)

    run = Places(world, [1])
    run.ask(1, *(f"client-{i}" for i in range(8)))
    run.see([1, 2])
    run.ask(2, *(f"b-{i}" for i in range(4)))
    yield judge("M", "the first node alone takes all", GOES_ON, (run.held(1), run.held(2)) == (4, 4))

    run = Places(world, range(8))
    for node in range(8):
        run.ask(node, f"c-{node}")
    run.see([0, 1, 2, 3, 4, 5, 6])
    yield judge("M", "a node is away", "it is not asked", len(run.roster.here()) == 7)
    run.see([0, 1, 2, 3, 4, 5, 6, 9])
    run.ask(9, "new")
    yield judge("M", "unregister, then add", "the new one has the place", run.held(9) == 1)

    run = Places(world, range(9))
    for node in range(9):
        run.ask(node, f"c-{node}")
    before = run.held(8)
    for _ in range(SILENT_ROUNDS):
        run.roster.heard("c-3", answered=False)
    run.see(range(9))
    yield judge("M", "a node is silent for rounds", "its place is free", (before, run.held(8)) == (0, 1))

    run = Places(world, [1])
    for _ in range(3):
        run.ask(1, *(f"x-{i}" for i in range(4000)))
        run.see([])
        run.see([1])
    yield judge("M", "4,000 announcements, three times", FEW_LINES, len(run.said) <= 12, f"{len(run.said)} lines")
    for name, text in (
        (
            "14,000 announcements",
            json.dumps([{"client": f"x-{i}", "num_examples": 9, "budget": 1.0} for i in range(14_000)]),
        ),
        ("half a million zeros announced", "[" + "0," * 499_999 + "0]"),
    ):
        yield refused(name, text)


def refused(name: str, announcements: str) -> Row:
    try:
        decode_announcements(Packed(announcements.encode(), b""))
        return judge("M", name, REFUSED, False)
    except WireError as error:
        return judge("M", name, REFUSED, len(str(error)) < 400, str(error))


def words() -> Iterator[Row]:
    """A6: whatever a client says is data."""
    for title, name in {
        "a line break in a name": "a\nclient-1 is node 5",
        "an ESC in a name": "\x1b[2J",
        "markup in a name": "[/b]",
        "a path for a name": "../../x",
        "a formula for a name": "=1+1",
        "a direction mark in a name": "a\u202eb",
        "a name of 300 characters": "a" * 300,
    }.items():
        yield refused(title, json.dumps([{"client": name, "num_examples": 1, "budget": None}]))
    for title, text in {
        "markup in an error": "[/b] [link=x]",
        "ESC in an error": "\x1b]0;own\x07\x1b[2J",
        "a forged line in an error": "x\nround 9  loss 0",
    }.items():
        shown = StringIO()
        with RunConsole(Console(file=shown, width=200)) as console:
            console.on_event("dropped", 1, {"client": "client-4", "stage": "training", "reason": text})
        line = shown.getvalue()
        yield judge(
            "M", title, SHOWN, line.count("\n") == 1 and "\x1b" not in line and printable(text) in line, line.strip()
        )
    cell, row = markdown_cell("a|b\n<img src=x>"), csv_row({"reason": "=cmd()"})["reason"]
    yield judge("M", "Markdown and HTML in an error", SHOWN, cell == "a\\|b &lt;img src=x>", cell)
    yield judge("M", "a formula in an error", SHOWN, row == "'=cmd()", row)


def figures() -> Iterator[Row]:
    """A7: what the events hold, the readers show."""
    for name, value in {
        "NaN": float("nan"),
        "infinite": float("inf"),
        "-infinite": -float("inf"),
        "1e308": 1e308,
    }.items():
        macro = {
            "examples": 4,
            "loss": value,
            "accuracy": value,
            "unparsed": value,
            "mc_accuracy": value,
            "chance": value,
            "majority": value,
        }
        client = {
            "client": "client-0",
            "tier": 0,
            "top_k": 2,
            "rank": 3,
            "examples": 4,
            "seconds": value,
            "loss": value,
            "tokens": 2**80,
        }
        use = {"utilization": [[value, 1.0]], "entropy": [value], "gini": [value], "dead_experts": 0}
        lines = [{"event": "client", "round": number, "download_bytes": 4, **client} for number in (1, 2)] + [
            {"event": "round", "round": 1, "seconds": value, "loss": value, **use},
            {
                "event": "evaluated",
                "round": 1,
                "tier": 0,
                "top_k": 2,
                "rank": 3,
                "scores": {"macro": macro, "task": macro},
            },
        ]
        events = [decode_json(encode_json(line)) for line in lines]
        config = parse_run({}).model_dump(mode="json")
        try:
            with RunConsole(Console(file=StringIO())) as console:
                for event in events:
                    console.on_event(event["event"], event["round"], event)
            report_html([series(RunRecord(Path("x"), config, {}, events, None))], [[]])
            yield judge("M", f"{name} in every figure", "watch and report show it", True)
        except Exception as error:
            yield judge("M", f"{name} in every figure", "watch and report show it", False, repr(error))


def hung_worker() -> Row:
    """A9: a process that never answers."""

    def work(job: Sequence[bytes]) -> list[bytes]:
        if job == [b"hang"]:
            time.sleep(3600)
        return list(job)

    with ProcessPool(2, work) as pool:
        answers = list(pool.map([[b"1"], [b"hang"], [b"2"]], seconds=0.5))
    died = isinstance(answers[1], Died) and answers[0] == [b"1"] and answers[2] == [b"2"]
    return judge("M", "a worker process hangs", DROPPED, died, getattr(answers[1], "how", ""))
