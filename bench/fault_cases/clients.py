"""A and F: clients that die, are silent, late or back again, and clients that lie where no check can see it."""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fault_cases.matrix import BOUNDED, DROPPED, STOPPED, Row, judge
from fault_cases.round_of_five import Honest, Round, field, within
from ubsmoe.config import parse_run
from ubsmoe.engines.local import UPDATE, LocalEngine
from ubsmoe.engines.processes import ProcessPool
from ubsmoe.engines.simulated import SimulatedEngine
from ubsmoe.errors import RoundError
from ubsmoe.maths.robust import TrimmedMean, capped_shares
from ubsmoe.messages import Update
from ubsmoe.wire.codec import Packed, decode_task, encode_update


def deaths(world: Round) -> Iterator[Row]:
    """Real processes; that of client 4 kills itself at a stage of its work."""
    for stage in ("before training", "during training", "after training", "in mid-upload"):

        def work(job: Sequence[bytes], stage: str = stage) -> list[bytes]:
            task = decode_task(Packed(*job[1:]), 1 << 30)
            dies = task.profile.client == "client-4"
            if dies and stage == "before training":
                os.kill(os.getpid(), signal.SIGKILL)
            for step in range(3):
                if dies and step == 1 and stage == "during training":
                    os.kill(os.getpid(), signal.SIGKILL)
            packed = encode_update(world.honest[int(task.profile.client[7:])], task.payload)
            if dies and stage == "after training":
                os.kill(os.getpid(), signal.SIGKILL)
            if dies:  # the pipe is the one file that a worker has: announce five parts, send half of one
                (pipe,) = (int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2 and is_open(int(name)))
                os.write(pipe, b"\0\0\0\4" + (5).to_bytes(4, "little") + len(packed.tensors).to_bytes(4, "big"))
                os.write(pipe, packed.tensors[: len(packed.tensors) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return [UPDATE, packed.header, packed.tensors]

        with ProcessPool(2, work) as pool:
            state, dropped = world.through(LocalEngine(None, {}, world.profiles, pool=pool))  # type: ignore[arg-type]
        yield judge("A", f"dies {stage}", DROPPED, world.is_mean_of_others(state), dropped[0].reason if dropped else "")


def is_open(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(descriptor).st_ino > 0
    return False


def silences(world: Round) -> Iterator[Row]:
    """Never an answer, too late, of a past round, with a clock of its own, back again, and too few that answer."""
    state, dropped = world.receive([*world.packed[:-1], ("client-4", None)])
    yield judge("A", "never answers", DROPPED, world.is_mean_of_others(state), dropped[0].reason)
    state, dropped = world.late("client-4", seconds=9.0, deadline=5.0)
    yield judge("A", "answers after the deadline", DROPPED, world.is_mean_of_others(state), dropped[0].reason)
    for name, change in (("answers for a past round", ("round", 0)), ("clock skew", ("seconds", -3600.0))):
        state, dropped = world.receive([*world.packed[:-1], ("client-4", field(*change)(world.packed[-1][1]))])
        yield judge("A", name, DROPPED, world.is_mean_of_others(state), dropped[0].reason)
    world.receive([*world.packed[:-1], ("client-4", None)])
    back, dropped = world.receive(world.packed)
    whole = world.aggregate(world.honest)
    same = not dropped and all(torch.equal(value, whole.adapters[name]) for name, value in back.adapters.items())
    yield judge("A", "rejoins", "counts again in its next round", same)
    try:
        world.receive([*world.packed[:2], *((client, None) for client, _ in world.packed[2:])])
        yield judge("A", "all drop (below quorum)", STOPPED, False)
    except RoundError as error:
        yield judge("A", "all drop (below quorum)", STOPPED, True, str(error))


def dropout(world: Round, rounds: int) -> Iterator[Row]:
    """Twenty clients, each silent in a fifth of the rounds; ten must answer."""
    settings = parse_run({"clients": {"count": 20}, "simulation": {"dropout": 0.2}, "rounds": {"quorum": 0.5}})
    engine, finished = SimulatedEngine(Honest(world, 20), settings, lambda _: 1.0), 0
    for number in range(1, rounds + 1):
        with contextlib.suppress(RoundError):
            world.through(engine, settings, number)
            finished += 1
    declared, observed = (f"{count}/{rounds} rounds finish at quorum" for count in (rounds, finished))
    yield Row("A", "20 % dropout, seed 0", declared, observed, beyond=True)


def lies(world: Round) -> Iterator[Row]:
    """One of five lies within every check: under the median no weight leaves what the other four sent."""
    honest, liar, sent = world.honest[:-1], world.honest[-1], world.state.adapters
    change = {name: value - sent[name] for name, value in liar.adapters.items()}
    mean = {name: torch.stack([one.adapters[name] for one in honest]).mean(0) for name in sent}
    spread = {name: torch.stack([one.adapters[name] for one in honest]).std(0) for name in sent}
    noise = torch.Generator().manual_seed(0)
    tensors = {
        "sign flip": {name: sent[name] - change[name] for name in sent},
        "Gaussian": {name: sent[name] + torch.randn(sent[name].shape, generator=noise) / 2 for name in sent},
        "ALIE": {name: mean[name] - 1.5 * spread[name] for name in sent},
        "free rider (replay)": dict(sent),
        # what other labels do to an update is anything: here, each weight's change is another's
        "label flip": {name: sent[name] + change[name].flip(0) for name in sent},
    }
    for name, adapters in tensors.items():
        yield judge("F", name, BOUNDED, holds_the_median(world, replace(liar, adapters=adapters)))
    hundredfold = {name: sent[name] + 100 * change[name] for name in sent}
    bad = world.encode(replace(liar, adapters=hundredfold))
    state, dropped = world.receive([*world.packed[:-1], ("client-4", bad)])
    yield judge("F", "x100", DROPPED, world.is_mean_of_others(state), dropped[0].reason if dropped else "")
    bad = field("num_examples", 10**9)(world.packed[-1][1])
    state, dropped = world.receive([*world.packed[:-1], ("client-4", bad)])
    yield judge("F", "Sybil weight", DROPPED, world.is_mean_of_others(state), dropped[0].reason if dropped else "")
    shares = torch.stack([one.expert_tokens / one.assignments for one in honest])
    for name, row in (("starves an expert", [10, 2, 2, 2, 2, 2]), ("floods one", [0, 4, 4, 4, 4, 4])):
        lie = torch.tensor([row, row])
        counted = capped_shares(torch.cat([shares, lie[None] / 20]), 1.5)[-1]
        low, high = shares.amin(0) / 1.5 - 1e-6, 1.5 * shares.amax(0) + 1e-6
        bounded = bool((counted >= low).all() and (counted <= high).all())
        passes, _ = world.receive([*world.packed[:-1], ("client-4", world.encode(replace(liar, expert_tokens=lie)))])
        reason = "passes the validator" if not world.is_mean_of_others(passes) else "does not pass the validator"
        yield judge("F", f"utilization lie that {name}", BOUNDED, bounded and reason == "passes the validator", reason)


def holds_the_median(world: Round, liar: Update) -> bool:
    """It passes the validator, moves the plain mean, and leaves the median among the honest."""
    replies = [*world.packed[:-1], ("client-4", world.encode(liar))]
    plain, dropped = world.receive(replies)
    held, _ = world.receive(replies, lambda: TrimmedMean(0, median=True))
    return not dropped and not world.is_mean_of_others(plain) and within(held, world.honest[:-1])
