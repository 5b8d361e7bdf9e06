"""[secure_aggregation] in a round: the sums of the plain one for every method that takes it, dropouts, refusals, and no trace."""

import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client import secure as secure_client
from ubsmoe.client.node_config import SECURE_STEPS, TRAIN, UNMASK
from ubsmoe.client.secure import SecureClient, private_limit, task_in
from ubsmoe.config import RunSettings, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine, process_pool
from ubsmoe.engines.simulated import as_simulated
from ubsmoe.errors import RoundError, UserError
from ubsmoe.maths import privacy
from ubsmoe.messages import Dropped, Profile, Reply, Task, Tensors, Update
from ubsmoe.methods import METHODS
from ubsmoe.methods.state import pack
from ubsmoe.plan.tiers import run_costs
from ubsmoe.secagg.messages import Start
from ubsmoe.secagg.vector import step_of
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.rounds import one_round
from ubsmoe.server.run import run
from ubsmoe.server.start import noise_key, start_state
from ubsmoe.storage.runfolder import RunFolder
from ubsmoe.wire.codec import decode_task, decode_update, encode_task, encode_update
from ubsmoe.wire.packed import Packed

FIVE = {
    "clients.count": 5,
    "tiers.budgets": [0.5, 1.0],
    "tiers.ranks": [2, 3],
    "adapter.router": "trained",
    "adapter.attention": "trained",
    "train.local_steps": 1,
    "train.rounds": 2,
    "evaluate.before": False,
    "evaluate.after": False,
    "data.synthetic.test_examples": 2,
}
SECURE = {"secure_aggregation.threshold": 0.6, "secure_aggregation.bits": 24}


class Engine(LocalEngine):
    """A local engine whose clients can vanish at a step of a secure round, or return something else."""

    def __init__(self, federation: Federation, gone: dict[str, set[str]], change: Callable[[Reply], Reply]) -> None:
        super().__init__(federation.trainer, federation.examples, federation.clients)
        self.gone, self.change = gone, change

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        return map(self.change, super().exchange(tasks))

    def ask(self, kind: str, round: int, messages: Any) -> Iterator[tuple[str, Packed | Dropped]]:
        there = ((name, packed) for name, packed in messages if name not in self.gone.get(kind, ()))
        yield from super().ask(kind, round, there)
        for name in self.gone.get(kind, ()):
            yield name, Dropped(name, round, "deadline", "gone")


def a_round(
    table: dict[str, Any],
    changes: dict[str, Any],
    gone: dict[str, set[str]] | None = None,
    change: Callable[[Reply], Reply] = lambda reply: reply,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The state after round 1, and the events."""
    federation = build_federation(parse_run(with_overrides(table, {**FIVE, **changes})))
    told: list[dict[str, Any]] = []
    state = one_round(
        federation,
        Engine(federation, gone or {}, change),
        start_state(federation),
        1,
        lambda event, number, **fields: told.append({"event": event, **fields}),
        noise_key(federation.settings),
    )
    return pack(state), told


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((value.double() - right[name].double()).abs().max()) for name, value in left.items())


def products(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """B A of every pair of factors."""
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return {name: tensors[f"{name}.B"].double() @ tensors[f"{name}.A"].double() for name in names}


STEP = 0.5 / (2**23 - 1)
FLOAT32 = 2.0**-24  # half a step of numbers below 1
USE_WEIGHS = {"a3smoe", "flame", "hfedmoe"}
OWN_FACTORS = {"fedit", "hetlora", "flexlora", "flora", "florist", "fedex_lora", "fedrot", "lora_fair", "scaffold"}
RECIPES = [
    *({"method.name": name} for name in METHODS),
    {"method.averaging.rule": "activation", "method.dmr.phi": "trained"},
    {"method.name": "flame", "method.dmr": True},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_it_is_the_plain_round_to_the_step_or_refused_with_a_reason(
    recipe: dict[str, Any], tiny_run: dict[str, Any]
) -> None:
    """Weights of use are rounded to 2^-16 themselves, which moves a mean of changes below 0.01 by less than 0.01 / 2^10."""
    try:
        secure, told = a_round(tiny_run, recipe | SECURE)
    except UserError as refusal:
        assert recipe.get("method.name") in OWN_FACTORS
        assert "[secure_aggregation] cannot be combined with method" in str(refusal)
        return
    plain, plainly = a_round(tiny_run, recipe)
    weighed = recipe.get("method.name") in USE_WEIGHS or "method.averaging.rule" in recipe
    if (
        recipe.get("method.name") == "fedsvd"
    ):  # factors are singular vectors, which turn; what they multiply to does not
        secure, plain = products(secure), products(plain)
    assert distance(secure, plain) <= (1e-5 if weighed else STEP + 2 * FLOAT32)
    (summary,) = (event for event in told if event["event"] == "round")
    (plain_summary,) = (event for event in plainly if event["event"] == "round")
    assert summary["loss"] == pytest.approx(plain_summary["loss"], abs=2e-5)
    torch.testing.assert_close(
        torch.tensor(summary["utilization"]), torch.tensor(plain_summary["utilization"]), rtol=0, atol=1e-6
    )
    clients = [event for event in told if event["event"] == "client"]
    assert len(clients) == 5 and not {"loss", "tokens", "assignments"} & {key for event in clients for key in event}
    assert len({event["upload_bytes"] for event in clients}) == 1  # and so nobody sees which experts a client used


def test_counts_are_the_plain_ones_exactly(tiny_run: dict[str, Any]) -> None:
    """lossfree moves a bias by the sign of whole numbers of tokens alone."""
    recipe = {"method.name": "lossfree", "method.step": 0.5}
    assert torch.equal(
        a_round(tiny_run, recipe | SECURE)[0]["server.bias"], a_round(tiny_run, recipe)[0]["server.bias"]
    )


@pytest.mark.parametrize("step", SECURE_STEPS)
@pytest.mark.parametrize("gone", [{"client-1"}, {"client-1", "client-4"}], ids=["one", "two"])
def test_one_and_two_of_five_may_vanish_at_any_step(step: str, gone: set[str], tiny_run: dict[str, Any]) -> None:
    secure, told = a_round(tiny_run, SECURE, {step: gone})
    lost = gone if step != UNMASK else set()

    def without(reply: Reply) -> Reply:
        return Dropped(reply.client, 1, "deadline", "gone") if reply.client in lost else reply

    plain, _ = a_round(tiny_run, {}, change=without)
    assert distance(secure, plain) <= STEP + 2 * FLOAT32
    assert {event["client"] for event in told if event["event"] == "dropped"} == gone


@pytest.mark.parametrize("step", SECURE_STEPS)
def test_three_of_five_stop_the_round_in_one_sentence(step: str, tiny_run: dict[str, Any]) -> None:
    with pytest.raises(RoundError, match=r"^round 1: .*(needs 3|3 are needed); nothing was unmasked"):
        a_round(tiny_run, SECURE, {step: {"client-0", "client-1", "client-4"}})


def test_the_quorum_is_asked_before_anything_is_unmasked(
    tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once summed over four, a round could not be summed over five when the fifth is back."""
    asked: list[str] = []
    honest = Engine.ask
    monkeypatch.setattr(Engine, "ask", lambda self, kind, *rest: asked.append(kind) or honest(self, kind, *rest))
    with pytest.raises(RoundError, match=r"round 1: 4 updates count, rounds.quorum asks for 5"):
        a_round(tiny_run, SECURE | {"rounds.quorum": 1.0}, {TRAIN: {"client-1"}})
    assert asked == [*SECURE_STEPS[:-1]]


def spoilt(reply: Reply, **changes: Any) -> Reply:
    return replace(reply, **changes) if isinstance(reply, Update) and reply.client == "client-2" else reply


def scaled(reply: Reply) -> Reply:
    if not isinstance(reply, Update) or reply.client != "client-2":
        return reply
    return replace(reply, adapters={name: 1e4 * value for name, value in reply.adapters.items()})


def test_a_client_keeps_its_own_update_out_of_the_sum_if_it_is_none(tiny_run: dict[str, Any]) -> None:
    def nan(reply: Reply) -> Reply:
        assert isinstance(reply, Update)
        return spoilt(reply, adapters={name: value * float("nan") for name, value in reply.adapters.items()})

    for change, reason in (
        (nan, "weights changed by nan"),
        (scaled, "(rounds.max_change)"),
        (
            lambda reply: spoilt(reply, extras={name: value + 20 for name, value in reply.extras.items()}),
            "phi reaches from",
        ),
        (
            lambda reply: spoilt(reply, num_examples=5000),
            "at most 4096 can be summed; raise secure_aggregation.max_examples",
        ),
    ):
        _, told = a_round(tiny_run, SECURE | {"method.dmr.phi": "trained"}, change=change)
        (lost,) = (event for event in told if event["event"] == "dropped")
        assert (lost["client"], lost["stage"]) == ("client-2", "training") and reason in lost["reason"]


UNEVEN = {"data.partition.kind": "quantity", "data.partition.alpha": 0.8, "data.synthetic.train_examples": 200}


def test_a_client_with_far_more_examples_than_the_median_is_not_asked_since_a_sum_cannot_cut_it_down(
    tiny_run: dict[str, Any],
) -> None:
    _, told = a_round(tiny_run, SECURE | UNEVEN | {"clients.max_weight": 1.0})
    counted = [event["examples"] for event in told if event["event"] == "client"]
    lost = [event for event in told if event["event"] == "dropped"]
    assert len(counted) == 3 and len(lost) == 2
    for event in lost:
        assert event["stage"] == "robust" and f"may weigh {max(counted)}, clients.max_weight" in event["reason"]


def test_who_has_most_of_the_announced_examples_is_told(tiny_run: dict[str, Any]) -> None:
    _, told = a_round(tiny_run, SECURE | UNEVEN | {"clients.max_weight": 100.0})
    examples = {event["client"]: event["examples"] for event in told if event["event"] == "client"}
    heaviest = max(examples, key=examples.__getitem__)
    share = examples[heaviest] / sum(examples.values())
    (warning,) = (event for event in told if event["event"] == "warning")
    assert share > 0.5 and warning == {
        "event": "warning",
        "client": heaviest,
        "reason": f"has {share:.0%} of the round's weight",
    }


def test_a_client_cuts_its_numbers_at_the_clip(tiny_run: dict[str, Any]) -> None:
    clip = {"secure_aggregation.clip": 1e-4}
    before = a_round(tiny_run, {"method.name": "fedavg", "train.learning_rate": 1e-12})[0]
    moved = distance(a_round(tiny_run, SECURE | clip | {"method.name": "fedavg"})[0], before)
    assert 0.9e-4 < moved < 1.01e-4


@pytest.mark.parametrize(
    "change",
    [
        {"num_examples": 4},
        {"assignments": 7},
    ],
    ids=str,
)
def test_a_sum_that_no_honest_clients_have_stops_the_round(change: dict[str, Any], tiny_run: dict[str, Any]) -> None:
    """A client that claims other examples than it announced, or counts that do not add up."""
    with pytest.raises(RoundError, match="this is no sum of valid updates"):
        a_round(tiny_run, SECURE, change=lambda reply: spoilt(reply, **change))


PRIVATE = {"privacy.noise_multiplier": 0.3, "privacy.clip_norm": 0.05, "privacy.seed": 5, "method.dmr.phi": "trained"}


def test_with_privacy_it_is_the_private_sum_to_the_step_and_has_its_noise(
    tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients clip by 0.05 less what rounding may add; that and a step for each of five are all the difference.

    Noise follows from the sums to the last bit, so that of two rounds a step apart it is drawn apart.
    """
    sums, noises = list[torch.Tensor](), list[torch.Tensor]()

    def watched(total: torch.Tensor, deviation: float, generator: torch.Generator) -> torch.Tensor:
        result = noisy(total, deviation, generator)
        sums.append(total.flatten().clone())
        noises.append((result - total).flatten())
        return result

    noisy = privacy.noisy
    monkeypatch.setattr(privacy, "noisy", watched)
    a_round(tiny_run, PRIVATE | SECURE)
    half = len(sums)
    a_round(tiny_run, PRIVATE)
    secure, plain = torch.cat(sums[:half]), torch.cat(sums[half:])
    assert float((secure - plain).abs().max()) < 1e-4 < 0.01 * float(plain.norm())
    drawn = torch.cat(noises[:half])
    assert len(drawn) > 5000 and float(drawn.std()) == pytest.approx(0.3 * 0.05, rel=0.05)
    assert not torch.equal(drawn, torch.cat(noises[half:]))


def test_rounding_never_makes_a_clients_vector_longer_than_the_clip_norm() -> None:
    longest = private_limit(1.0, 8, 1000)
    vector = torch.full([1000], longest / 1000**0.5, dtype=torch.float64)
    step = step_of(1.0, 8)
    assert float(((vector / step).floor() * step + step).norm()) <= 1.0  # every number rounded up
    with pytest.raises(UserError, match=r"raise secure_aggregation\.bits"):
        private_limit(1.0, 8, 20_000)


REFUSED = [
    ({"robust.rule": "median"}, r"\[secure_aggregation\] shows the server no single update, which \[robust\] needs"),
    ({"robust.clip_norm": 1.0}, "no single update"),
    ({"clients.per_round": 3, "rounds.extra_clients": 1}, "rounds.extra_clients counts; leave them out"),
    ({"rounds.max_ratio": 4.0}, r"rounds.max_ratio = 4 judges single updates .* secure_aggregation\.clip bounds"),
    ({"wire.dtype": "int8"}, 'wire.dtype is "int8", but .* sends integers of its own for every expert'),
    ({"clients.per_round": 2}, r"needs 3 clients in a round, there are 2"),
    ({"secure_aggregation.threshold": 0.5}, "secure_aggregation.threshold: .*greater than 0.5"),
    ({"secure_aggregation.max_examples": 2**40}, "do not fit 64-bit words; lower max_examples or bits"),
    ({"method.averaging.rule": "exact"}, "each client's own factors, which a sum of them does not tell"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_cannot_run_on_sums_is_refused_when_the_run_file_is_read(
    changes: dict[str, Any], sentence: str, tiny_run: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=sentence):
        run_costs(parse_run(with_overrides(tiny_run, {**FIVE, **SECURE, **changes})))


def test_without_cryptography_the_extra_is_named(tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ubsmoe.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'this needs cryptography: pip install "ubsmoe\[secagg\]"'):
        run_costs(parse_run(with_overrides(tiny_run, {**FIVE, **SECURE})))


def carry_out(settings: RunSettings, folder: Path, workers: int = 1, stop_in: int = 0) -> dict[str, Any]:
    federation = build_federation(settings)

    def report(event: str, number: int, fields: dict[str, Any]) -> None:
        if (event, number) == ("round", stop_in):
            raise KeyboardInterrupt

    with process_pool(federation, workers) as pool, RunFolder.open_or_create(folder, to_json(settings)) as opened:
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        return run(federation, opened, as_simulated(engine, federation), report)


@pytest.mark.parametrize("simulated", [False, True])
def test_the_same_bits_twice_in_workers_and_after_a_resume(
    simulated: bool, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Masks are drawn anew each time and leave no trace in the sum."""
    dropout = {"simulation.dropout": 0.2, "simulation.speed_spread": 0.5} if simulated else {}
    settings = parse_run(with_overrides(tiny_run, {**FIVE, **SECURE, **dropout, "threads": 1, "train.rounds": 3}))
    whole = carry_out(settings, tmp_path / "whole")["adapter_sha256"]
    assert carry_out(settings, tmp_path / "again")["adapter_sha256"] == whole
    assert carry_out(settings, tmp_path / "workers", workers=2)["adapter_sha256"] == whole
    with pytest.raises(KeyboardInterrupt):
        carry_out(settings, tmp_path / "stopped", stop_in=2)
    assert carry_out(settings, tmp_path / "stopped")["adapter_sha256"] == whole
    lost = [line for line in (tmp_path / "whole/events.jsonl").read_text().splitlines() if '"dropped"' in line]
    assert bool(lost) == simulated


# The server in a process of its own, searched for a client's update while it waits for a message.


def serve(federation: Federation, line: Connection) -> None:
    """One round; every message goes through the line."""

    class ElsewhereEngine:
        def clients(self) -> list[Profile]:
            return federation.clients

        def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
            for task in tasks:
                line.send(("plain", task.profile.client, *astuple(encode_task(task))))
                yield decode_update(Packed(*line.recv()), sys.maxsize, task.payload)

        def ask(self, kind: str, round: int, messages: Any) -> Iterator[tuple[str, Packed]]:
            for name, packed in messages:
                line.send((kind, name, packed.header, packed.tensors))
                yield name, Packed(*line.recv())

    torch.set_num_threads(1)
    one_round(federation, ElsewhereEngine(), start_state(federation), 1, lambda *_, **__: None)
    line.send(("done", "", b"", b""))
    line.recv()


def is_in_memory(pid: int, trace: bytes) -> bool:
    """Whether these bytes stand anywhere in a process's own memory."""
    regions = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for low, high in (
            part[0].split("-") for part in regions if "rw" in part[1] and not part[-1].startswith("/dev")
        ):
            try:
                memory.seek(int(low, 16))
                if trace in memory.read(int(high, 16) - int(low, 16)):
                    return True
            except OSError:
                continue
    return False


def traces_of(update: Update, sent: Tensors) -> dict[str, bytes]:
    """How a client's change could lie in memory: the first numbers of one tensor that all changed."""
    name = "layers.1.down.B"
    value, before = update.adapters[name][1].flatten()[:8], sent[name][1].flatten()[:8]
    change, change64 = value - before, value.double() - before.double()
    assert len(set(change.tolist())) == 8
    parts = {"value": value, "change": change, "value64": value.double(), "change64": change64}
    return {kind: part.numpy().tobytes() for kind, part in parts.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.thorough
@pytest.mark.parametrize("secure", [True, False], ids=["secure", "plain"])
def test_a_clients_update_is_nowhere_in_the_servers_memory(
    secure: bool, tiny_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search finds a plain update, and of a masked one neither its numbers nor its words."""
    settings = parse_run(with_overrides(tiny_run, {**FIVE, **(SECURE if secure else {})}))
    federation = build_federation(settings)
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("fork").Process(target=serve, args=(federation, theirs), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        server.start()
    engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
    clients = {name: SecureClient(name, settings) for name in federation.examples} if secure else {}
    traces: dict[str, bytes] = {}
    honest_mask = secure_client.mask

    def recording(memory: Any, boxes: Any, vector: torch.Tensor) -> Any:
        if memory.client == "client-3":
            start = next(i for i in range(len(vector)) if len(set(vector[i : i + 8].tolist()) - {0}) == 8)
            traces["words"] = vector[start : start + 8].numpy().tobytes()
        return honest_mask(memory, boxes, vector)

    monkeypatch.setattr(secure_client, "mask", recording)
    found: set[str] = set()
    while (job := ours.recv())[0] != "done":
        kind, name, packed = job[0], job[1], Packed(*job[2:])
        if traces and name == "client-4":  # the server waits, and has what client-3 sent before
            found |= {kind for kind, trace in traces.items() if is_in_memory(server.pid or 0, trace)}
        if kind in ("plain", TRAIN):
            task = task_in(Start.read(packed.header), packed) if secure else decode_task(packed, sys.maxsize)
            (update,) = engine.exchange([task])
            assert isinstance(update, Update)
            if name == "client-3":
                traces |= traces_of(update, task.payload)
            if secure:
                answer = clients[name].masked(Start.read(packed.header), task, update, federation.method)
            else:
                answer = encode_update(update, task.payload)
        else:
            answer = clients[name].answer(kind, packed)
        ours.send((answer.header, answer.tensors))
    found |= {kind for kind, trace in traces.items() if is_in_memory(server.pid or 0, trace)}
    assert is_in_memory(server.pid or 0, federation.run_id.encode()) and len(traces) == (5 if secure else 4)
    ours.send(None)
    server.join(30)
    assert found == (set() if secure else found | {"value"})
