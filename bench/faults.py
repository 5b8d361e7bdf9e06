"""What a server does with what it is sent: every fault, the declared outcome, the observed one. Ends with 1 if they differ.

    python bench/faults.py [--quick] [--out FILE]

Five clients of a random two-layer mixture answer one FedAvg round as bytes; one answer is bad. It must be dropped with a reason,
and the round's result must be, bit for bit, the mean of the other four. Where flwr is installed, its own FedAvg gets the same
15 bad replies. Then: 20,000 mutated messages, 1,000 bit flips and 100 truncations of a checkpoint, 50 rounds with 20 % dropout.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from rich.table import Table
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.config import RoundSettings, parse_run
from ubsmoe.engines.simulated import SimulatedEngine
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.base import Base, State
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.storage.checkpoints import CheckpointError, load_newest, save_checkpoint
from ubsmoe.storage.disk import encode_json
from ubsmoe.storage.runfolder import atomic_write
from ubsmoe.wire.checks import Form
from ubsmoe.wire.codec import Packed, WireError, decode_update, encode_update
from ubsmoe.wire.gate import Gate, RoundError, expected_form

A, ROOM = "adapters.layers.0.up.A", 1 << 20
DROPPED = "drop that client, go on"
Fields, Tensors = dict[str, Any], dict[str, torch.Tensor]


class Round:
    """One round of five clients: what they were asked, and what honest ones answer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = OlmoeConfig(
            vocab_size=32, hidden_size=12, intermediate_size=10, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_experts=6, num_experts_per_tok=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
        self.model = SparseModel(OlmoeForCausalLM(config).eval())
        base = Base(num_layers=2, num_experts=6, k_max=4, rank=3, alpha=6.0)
        self.method = build("fedavg", base)
        self.state = self.method.start(self.model.fresh_adapter(3, generator_for(0), shared_a=True))
        profiles = [self.method.profile(base, f"client-{i}", 1, 0.5, 3, 10 + i) for i in range(5)]
        self.tasks = [Task(1, p, self.method.dispatch(self.state, p), "run", "base") for p in profiles]
        self.honest = [self._answer(task) for task in self.tasks]
        self.others = self.method.aggregate(self.state, iter(self.honest[:-1]))

    def _answer(self, task: Task) -> Update:
        draw, profile = generator_for(task.profile.client), task.profile
        moved = {name: v + 0.1 * torch.randn(v.shape, generator=draw) for name, v in task.payload.items()}
        counts = torch.tensor([[4, 4, 4, 4, 2, 2], [10, 10, 0, 0, 0, 0]])  # ten tokens, K = 2
        return Update(
            profile.client, 1, profile.num_examples, moved, counts, 10, 20, 1.0, 1.0, {}, profile.tier, "run", "base"
        )

    def form(self, task: Task) -> Form:
        """What an answer to this task looks like."""
        return expected_form(self.model, self.method, task)

    def receive(self, replies: Iterable[tuple[str, Packed | None]]) -> tuple[State, list[Dropped]]:
        """The server's whole way from bytes to the next state."""
        dropped: list[Dropped] = []
        gate = Gate(self.form, RoundSettings(), elastic=False, wanted=5, drop=dropped.append)
        list(gate.ask(self.tasks))
        return self.method.aggregate(self.state, gate.passed(_decoded(replies))), dropped


def _decoded(replies: Iterable[tuple[str, Packed | None]]) -> Iterator[Reply]:
    for client, packed in replies:
        try:
            yield Dropped(client, 1, "training", "no answer") if packed is None else decode_update(packed, ROOM)
        except WireError as error:
            yield Dropped(client, 1, "wire", str(error))


def opened(packed: Packed) -> tuple[Fields, Tensors]:
    return json.loads(packed.header), safetensors.torch.load(packed.tensors)


def closed(fields: Fields, tensors: Tensors) -> Packed:
    """As an attacker packs: whatever dtype, whatever field, and the hash that fits."""
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    return sealed(json.dumps(fields).encode(), safetensors.torch.save(own))


def sealed(header: bytes, blob: bytes) -> Packed:
    """With the hash that fits, if the header can hold one."""
    try:
        return Packed(json.dumps({**json.loads(header), "sha256": hashlib.sha256(blob).hexdigest()}).encode(), blob)
    except (ValueError, TypeError):
        return Packed(header, blob)


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = A) -> Callable[[Packed], Packed]:
    def bad(packed: Packed) -> Packed:
        fields, tensors = opened(packed)
        return closed(fields, tensors | {name: change(tensors[name])})

    return bad


def one(value: float) -> Callable[[Packed], Packed]:
    def poison(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t[1, 2, 3] = value
        return t

    return tensor(poison)


def field(name: str, value: Any) -> Callable[[Packed], Packed]:
    return lambda packed: replace(packed, header=json.dumps({**json.loads(packed.header), name: value}).encode())


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Packed], Packed]:
    return lambda packed: closed(opened(packed)[0], change(opened(packed)[1]))


def blob(change: Callable[[bytes], bytes]) -> Callable[[Packed], Packed]:
    return lambda packed: sealed(packed.header, change(packed.tensors))


def twice(data: bytes) -> bytes:
    """The header's first tensor named a second time."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header = header[:-1] + b"," + header[1:]
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def swapped(found: Tensors) -> Tensors:
    b = A.replace(".A", ".B")
    return found | {A: found[b], b: found[A]}


def many(data: bytes) -> bytes:
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    ).encode()
    return len(header).to_bytes(8, "little") + header


def counts(row: list[int]) -> Callable[[Packed], Packed]:
    return tensor(lambda t: torch.cat([t[:1], torch.tensor([row])]), "expert_tokens")


FIFTEEN: dict[str, Callable[[Packed], Packed]] = {
    "NaN": one(float("nan")),
    "Inf": one(float("inf")),
    "1e30": one(1e30),
    "wrong shape": tensor(lambda t: t[:, :, :5]),
    "broadcasting shape": tensor(lambda t: t[:1]),
    "extra dimension": tensor(lambda t: t[None]),
    "int8": tensor(lambda t: t.to(torch.int8)),
    "float64": tensor(lambda t: t.double()),
    "complex64": tensor(lambda t: t.to(torch.complex64)),
    "missing key": tensors(lambda found: {name: t for name, t in found.items() if name != A}),
    "extra key": tensors(lambda found: found | {"adapters.layers.9.up.A": found[A]}),
    "weight NaN": field("num_examples", float("nan")),
    "weight -39": field("num_examples", -39),
    "weight 1e12": field("num_examples", 10**12),
    "one extra metric": field("accuracy", 1.0),
}
"""What flwr's FedAvg is given too."""

CONTENT = {
    "-Inf": one(-float("inf")),
    "transposed": tensor(lambda t: t.mT),
    "wrong rank for the tier": tensor(lambda t: t[:, :2]),
    "zero-size": tensor(lambda t: t[:0]),
    "float8": tensor(lambda t: t.to(torch.float8_e4m3fn)),
    "duplicate key": blob(twice),
    "expert index >= M": tensor(lambda t: torch.cat([t, t[:1]])),
    "a frozen base key": tensors(lambda found: found | {"model.embed_tokens.weight": found[A]}),
    "empty update": tensors(lambda found: {}),
    "A and B swapped": tensors(swapped),
}
METADATA = {
    "weight 0": field("num_examples", 0),
    "weight bool": field("num_examples", True),
    "weight text": field("num_examples", "many"),
    "wrong round": field("round", 7),
    "wrong run id": field("run", "another"),
    "wrong base-model hash": field("base", "another"),
    "wrong tier": field("tier", 0),
    "utilization of wrong length": tensor(lambda t: t[:, :5], "expert_tokens"),
    "utilization negative": counts([10, 10, 1, -1, 0, 0]),
    "utilization sum is not tokens K": counts([10, 9, 0, 0, 0, 0]),
    "utilization above its tokens": counts([20, 0, 0, 0, 0, 0]),
}
TRANSPORT = {
    "bit flip in the header": blob(lambda data: data[:9] + bytes([data[9] ^ 128]) + data[10:]),
    "bit flip in a weight": lambda packed: replace(
        packed, tensors=packed.tensors[:-1] + bytes([packed.tensors[-1] ^ 1])
    ),
    "truncated": blob(lambda data: data[: len(data) // 2]),
    "over the size cap": blob(lambda data: data + bytes(ROOM)),
    "compressed bytes": blob(lambda data: gzip.compress(bytes(1 << 20))),
    "a header of 100,000 tensors": blob(many),
    "pickle bytes": blob(lambda data: b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix"),
    "a path in a tensor name": tensors(lambda found: found | {"adapters.../../x": found[A]}),
}


def bad_replies(world: Round, rows: list[list[str]]) -> None:
    for section, cases in (("15", FIFTEEN), ("B", CONTENT), ("C", METADATA), ("D", TRANSPORT)):
        for name, spoil in cases.items():
            replies = [(update.client, encode_update(update)) for update in world.honest]
            state, dropped = world.receive([*replies[:-1], (replies[-1][0], spoil(replies[-1][1]))])
            same = all(torch.equal(value, world.others.adapters[key]) for key, value in state.adapters.items())
            contained = same and [one.client for one in dropped] == ["client-4"]
            rows.append(
                [section, name, DROPPED, DROPPED if contained else "COUNTED", dropped[0].reason if dropped else ""]
            )


def lives(world: Round, rows: list[list[str]]) -> None:
    """A client that is silent, one that answers twice, and too few that answer."""
    replies = [(update.client, encode_update(update)) for update in world.honest]
    silent, _ = world.receive([*replies[:-1], ("client-4", None)])
    twice, dropped = world.receive([*replies[:-1], replies[0]])
    for name, state in (("never answers", silent), ("duplicate", twice)):
        same = all(torch.equal(value, world.others.adapters[key]) for key, value in state.adapters.items())
        rows.append(
            ["A", name, DROPPED, DROPPED if same else "COUNTED", dropped[0].reason if name == "duplicate" else ""]
        )
    try:
        world.receive([*replies[:2], *((client, None) for client, _ in replies[2:])])
        outcome, reason = "WENT ON", ""
    except RoundError as error:
        outcome, reason = "stop, checkpoint intact", str(error)
    rows.append(["A", "below quorum", "stop, checkpoint intact", outcome, reason])


class Honest:
    """An engine whose clients all answer honestly, each as one of the five."""

    def __init__(self, world: Round) -> None:
        self._answers = world.honest

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Update]:
        """One honest update per task."""
        for task in tasks:
            client = task.profile.client
            yield replace(self._answers[int(client[7:]) % 5], client=client, round=task.round)


def dropout(world: Round, rows: list[list[str]], rounds: int) -> None:
    """Twenty clients, each silent in a fifth of the rounds; ten must answer."""
    settings = parse_run({"clients": {"count": 20}, "simulation": {"dropout": 0.2}, "rounds": {"quorum": 0.5}})
    engine, finished = SimulatedEngine(Honest(world), settings, lambda _: 1.0), 0
    for number in range(1, rounds + 1):
        gate = Gate(world.form, settings.rounds, elastic=False, wanted=20, drop=lambda _: None)
        asked = [(f"client-{i}", world.tasks[i % 5]) for i in range(20)]
        tasks = [replace(task, round=number, profile=replace(task.profile, client=name)) for name, task in asked]
        with contextlib.suppress(RoundError):
            finished += len(list(gate.passed(engine.exchange(gate.ask(tasks))))) >= 10
    declared = f"{rounds}/{rounds} rounds finish at quorum"
    rows.append(["A", "20 % dropout, seed 0", declared, f"{finished}/{rounds} rounds finish at quorum", ""])


def fuzz(world: Round, rows: list[list[str]], inputs: int) -> None:
    """Seeded mutations of a good message: bytes flipped, cut, repeated, replaced."""
    good, draw = encode_update(world.honest[0]), random.Random(0)
    before, typed, read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0
    for _ in range(inputs):
        header, data = bytearray(good.header), bytearray(good.tensors)
        target = header if draw.random() < 0.3 else data
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(min(len(target), draw.choice([8, 600, len(target)])) or 1)
            kind = draw.randrange(4)
            if kind == 0:
                target[place : place + 1] = bytes([draw.randrange(256)])
            elif kind == 1:
                del target[place : place + draw.randint(1, 64)]
            elif kind == 2:
                target[place:place] = draw.randbytes(draw.randint(1, 64))
            else:
                target[place:place] = bytes(target[: draw.randint(1, 64)])
            if not target:
                break
        try:
            decode_update(sealed(bytes(header), bytes(data)), ROOM)
            read += 1
        except WireError:
            typed += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    declared = f"{inputs} read or typed error, memory within cap + 64 MiB"
    fits = typed + read == inputs and grown < ROOM / 2**20 + 64
    rows.append(
        [
            "D",
            f"{inputs} mutated messages",
            declared,
            declared if fits else "MORE",
            f"{typed} refused, +{grown:.0f} MiB",
        ]
    )


def checkpoints(rows: list[list[str]], flips: int, cuts: int) -> None:
    """A damaged newest checkpoint is passed over for the one before, always."""
    draw, refused = random.Random(1), 0
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            save_checkpoint(folder, number, {"w": torch.arange(50.0) + number}, {"round": number})
        newest = Path(folder) / "round-00002"
        files = {path: path.read_bytes() for path in newest.iterdir()}
        for attempt in range(flips + cuts):
            path = draw.choice(sorted(files))
            data, place = bytearray(files[path]), draw.randrange(len(files[path]))
            if attempt < flips:
                data[place] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(data if attempt < flips else data[:place]))
            try:
                found = load_newest(folder)
                refused += found is not None and found.round == 1 and len(found.skipped) == 1
            except CheckpointError:
                pass
            path.write_bytes(files[path])
        shutil.rmtree(newest)
    declared = f"{flips + cuts} refused, the one before loads"
    rows.append(["E", f"{flips} bit flips, {cuts} cuts", declared, f"{refused} refused, the one before loads", ""])


def in_flower(world: Round) -> dict[str, str] | None:
    """The same 15 replies in flwr's FedAvg: contained, corrupt, accepted in a wrong dtype, or the run stops."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    try:
        import numpy as np
        from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
        from flwr.serverapp.strategy import FedAvg
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        return None
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def reply(packed: Packed) -> Any:
        fields, found = opened(packed)
        arrays = {name: Array(value.numpy()) for name, value in found.items() if name.startswith("adapters.")}
        metrics = {"num-examples": fields["num_examples"]} | {k: fields[k] for k in ("accuracy",) if k in fields}
        asked = Message(RecordDict(), dst_node_id=2, message_type="train")
        return Message(RecordDict({"a": ArrayRecord(arrays), "m": MetricRecord(metrics)}), reply_to=asked)

    def mean(packed: list[Packed]) -> dict[str, Any] | None:
        arrays, _ = FedAvg().aggregate_train(1, [reply(one) for one in packed])
        return None if arrays is None else {name: array.numpy() for name, array in arrays.items()}

    good = [encode_update(update) for update in world.honest]
    four = mean(good[:-1])
    assert four is not None
    outcomes = {}
    for name, spoil in FIFTEEN.items():
        try:
            got = mean([*good[:-1], spoil(good[-1])])
        except Exception as error:
            outcomes[name] = f"run stops ({type(error).__name__})"
            continue
        if got is None or got.keys() != four.keys():
            outcomes[name] = "run stops (no result)" if got is None else "corrupt"
        elif all(np.array_equal(got[key], four[key]) for key in four):
            outcomes[name] = "contained"
        else:
            wild = any(
                not np.isfinite(v).all() or v.shape != four[k].shape or np.abs(v - four[k]).max() > 1
                for k, v in got.items()
            )
            other = any(value.dtype != four[key].dtype for key, value in got.items())
            outcomes[name] = "corrupt" if wild else "accepted, wrong dtype" if other else "in the mean"
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the mutations")
    parser.add_argument("--out", type=Path, help="write the matrix as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    world, rows, share = Round(), [], 10 if chosen.quick else 1
    bad_replies(world, rows)
    lives(world, rows)
    dropout(world, rows, 50)
    fuzz(world, rows, 20_000 // share)
    checkpoints(rows, 1000 // share, 100 // share)
    stock = in_flower(world)
    undeclared = [row for row in rows if row[2] != row[3]]

    table = Table("", "fault", "declared", "observed", "reason")
    for row in rows:
        table.add_row(*(cell[:70] for cell in row))
    console = Console(width=200)
    console.print(table)
    if stock:
        beside = Table("bad reply, one of five", "here", "flwr FedAvg")
        for row in rows[: len(FIFTEEN)]:
            beside.add_row(row[1], "contained" if row[2] == row[3] else "COUNTED", stock[row[1]])
        console.print(beside)
    contained = sum(row[2] == row[3] for row in rows[: len(FIFTEEN)])
    console.print(
        f"bad replies contained: {contained} of {len(FIFTEEN)}; faults: {len(rows)}, undeclared: {len(undeclared)}"
    )
    if chosen.out:
        atomic_write(chosen.out, encode_json({"faults": rows, "flwr_fedavg": stock}, indent=1))
    sys.exit(bool(undeclared))


if __name__ == "__main__":
    main()
