"""One round of five clients on a random two-layer mixture, and the tools of whoever sends what was not asked for."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.config import RunSettings, parse_run
from ubsmoe.engines.simulated import SimulatedEngine
from ubsmoe.maths.means import Mean, WeightedMean
from ubsmoe.messages import Dropped, Engine, Profile, Reply, Task, Update
from ubsmoe.methods import build
from ubsmoe.methods.chosen import tier_profiles
from ubsmoe.methods.method import RunShape, State, contribution
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation
from ubsmoe.server.rounds import one_round
from ubsmoe.wire.codec import Packed, WireError, decode_update, encode_update

A, ROOM = "adapters.layers.0.up.A", 1 << 20
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
        self.shape = shape = RunShape(num_layers=2, num_experts=6, k_max=4, rank=3, alpha=6.0)
        self.method = build("fedavg", shape)
        self.state = self.method.start(self.model.fresh_adapter(3, generator_for(0), shared_a=True))
        self.profiles = [self.method.profile(shape, f"client-{i}", 1, 0.5, 3, 10 + i) for i in range(5)]
        federation = self.federation(parse_run({"clients": {"count": 5}}))
        run, base = federation.run_id, federation.base_sha256
        self.tasks = [Task(1, p, self.method.dispatch(self.state, p), run, base) for p in self.profiles]
        self.spec = federation.specs(self.tasks[0])
        self.honest = [self._answer(task) for task in self.tasks]
        self.others = self.aggregate(self.honest[:-1])
        self.packed = [(update.client, self.encode(update)) for update in self.honest]

    def federation(self, settings: RunSettings, mean: Callable[[], Mean] = WeightedMean) -> Federation:
        """A run of these clients, without data and questions."""
        method = build("fedavg", replace(self.shape, mean=mean))
        tiers = tier_profiles(settings, method, self.shape)
        return Federation(
            settings, self.model, self.model, None, method, self.shape, self.profiles, tiers, {}, {}, None, "base", None
        )

    def encode(self, update: Update) -> Packed:
        """An update's bytes; all five were sent the same payload."""
        return encode_update(update, self.tasks[0].payload)

    def decode(self, client: str, packed: Packed | None) -> Reply:
        """What the server makes of an answer, or of none."""
        try:
            answer = packed and decode_update(packed, ROOM, self.tasks[0].payload, self.spec)
            return answer or Dropped(client, 1, "training", "no answer")
        except WireError as error:
            return Dropped(client, 1, "wire", str(error))

    def _answer(self, task: Task) -> Update:
        draw, profile = generator_for(task.profile.client), task.profile
        moved = {name: v + 0.1 * torch.randn(v.shape, generator=draw) for name, v in task.payload.items()}
        counts = torch.tensor([[4, 4, 4, 4, 2, 2], [10, 10, 0, 0, 0, 0]])  # ten tokens, K = 2
        return Update(
            profile.client,
            1,
            profile.num_examples,
            moved,
            counts,
            10,
            20,
            1.0,
            1.0,
            {},
            profile.tier,
            task.run,
            task.base,
        )

    def is_mean_of_others(self, state: State) -> bool:
        """Whether a state is, bit for bit, what the first four clients alone give."""
        return all(torch.equal(value, self.others.adapters[name]) for name, value in state.adapters.items())

    def aggregate(self, updates: Iterable[Update]) -> State:
        """The next state by the plain mean, whatever else the server would check."""
        return self.method.aggregate(self.state, map(contribution, updates))

    def receive(
        self, replies: Iterable[tuple[str, Packed | None]], mean: Callable[[], Mean] = WeightedMean
    ) -> tuple[State, list[Dropped]]:
        """The server's whole way from bytes to the next state."""
        return self.through(Answers(self.profiles, [self.decode(*reply) for reply in replies]), mean=mean)

    def through(
        self,
        engine: Engine,
        settings: RunSettings | None = None,
        number: int = 1,
        mean: Callable[[], Mean] = WeightedMean,
    ) -> tuple[State, list[Dropped]]:
        """A round as a run has it: the next state, and who was dropped."""
        dropped: list[Dropped] = []
        self.warned = list[str]()

        def log(event: str, number: int, **fields: Any) -> None:
            if event == "dropped":
                dropped.append(Dropped(fields["client"], number, fields["stage"], fields["reason"]))
            if event == "warning":
                self.warned.append(fields["client"])

        federation = self.federation(settings or parse_run({"clients": {"count": 5}}), mean)
        return one_round(federation, engine, self.state, number, log), dropped

    def late(self, client: str, seconds: float, deadline: float) -> tuple[State, list[Dropped]]:
        """The round on the virtual clock, one client answering after so many seconds, the others after one."""
        table = {"clients": {"count": 5}, "simulation": {}, "rounds": {"deadline_seconds": deadline}}
        settings = parse_run(table)
        engine = SimulatedEngine(Honest(self), settings, lambda p: seconds if p.client == client else 1.0)
        return self.through(engine, settings)


class Honest:
    """An engine whose clients all answer honestly, each as one of the five."""

    def __init__(self, world: Round, count: int = 5) -> None:
        self._answers = world.honest
        self._profiles = [replace(world.profiles[i % 5], client=f"client-{i}") for i in range(count)]

    def clients(self) -> list[Profile]:
        """The five, or more that do as they do."""
        return self._profiles

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Update]:
        """One honest update per task."""
        for task in tasks:
            client = task.profile.client
            yield replace(self._answers[int(client[7:]) % 5], client=client, round=task.round, run=task.run)


class Answers:
    """An engine that has these replies, whatever was asked."""

    def __init__(self, profiles: list[Profile], replies: list[Reply]) -> None:
        self._profiles, self._replies = profiles, replies

    def clients(self) -> list[Profile]:
        """Who is asked."""
        return self._profiles

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """The replies, once all tasks are out."""
        list(tasks)
        yield from self._replies


def within(state: State, honest: Iterable[Update]) -> bool:
    """Whether every weight lies between two honest ones."""
    sent = list(honest)
    return all(
        bool((value >= torch.stack([one.adapters[name] for one in sent]).amin(0)).all())
        and bool((value <= torch.stack([one.adapters[name] for one in sent]).amax(0)).all())
        for name, value in state.adapters.items()
    )


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
