"""kill -9 at random points of a run, resumed each time: the final adapter must have the uninterrupted run's SHA-256.

    python bench/kill.py [--kills 200] [--quick] [--private | --secret] [--out FILE]

`--private` adds [privacy] with a seed: the same hash, and an epsilon that counts every model that went out, repeated ones too.
`--secret` leaves the seed out: no two attempts at a round have the same salt, and every run must end in another adapter.

A small run of real training is prepared once; every attempt is a forked process that carries it out in a folder of its own and is
killed at a random moment, then another that goes on in that folder. Moments are drawn in processor time, so that they are spread
over the run however busy the machine is. One that ended before its kill does not count. Exit code 1 if any resumed run ends in
another hash, or fails.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from fault_cases.small_run import small_settings, write_base

from ubsmoe.config import RunSettings, to_json
from ubsmoe.engines.local import LocalEngine
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.privacy import spent
from ubsmoe.server.run import run
from ubsmoe.storage.json_text import encode_json
from ubsmoe.storage.runfolder import RunFolder, atomic_write

PRIVATE = {
    "privacy.noise_multiplier": 1.0,
    "privacy.clip_norm": 0.5,
    "privacy.seed": 7,
    "clients.per_round": 1,
    "clients.sampling": "poisson",
    "rounds.quorum": 0.0,
}
FEWER = {"clients.count": 2, "tiers.budgets": [0.5], "tiers.ranks": [2]}  # what is killed here is the server


def carry_out(federation: Federation, folder: Path) -> None:
    with RunFolder.open_or_create(folder, to_json(federation.settings)) as opened:
        run(
            federation,
            opened,
            LocalEngine(federation.trainer, federation.examples, federation.clients),
            lambda *_: None,
        )


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does this and exits, 0 if it went well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has had (Linux: the number of its clock follows from its pid)."""
    return time.clock_gettime(~pid << 3 | 2)


def hash_of(folder: Path) -> str | None:
    summary = folder / "summary.json"
    return json.loads(summary.read_text())["adapter_sha256"] if summary.exists() else None


def accounted(folder: Path, settings: RunSettings) -> bool:
    """Whether every attempt has a salt of its own, and epsilon counts every model that went out."""
    notes = [json.loads(line) for line in (folder / "releases.jsonl").read_text().splitlines()]
    salts = [note["salt_sha256"] for note in notes if note["event"] == "attempt"]
    out = [note["round"] for note in notes if note["event"] == "released"]
    told = json.loads((folder / "summary.json").read_text())["privacy"]["epsilon"]
    whole = {*range(1, settings.train.rounds + 1)} == {*out}
    return whole and len(salts) == len({*salts}) >= len(out) and told == spent(settings, len(out))["epsilon"]


def where(folder: Path) -> str:
    """How far a killed run had come."""
    if not (folder / "config.json").exists():
        return "before the folder was a run"
    lines = (folder / "events.jsonl").read_bytes().splitlines() if (folder / "events.jsonl").exists() else []
    if not lines:
        return "before the first event"
    if list((folder / "checkpoints").glob(".draft-*")):
        return "in a save"
    try:
        return f"after event {json.loads(lines[-1])['event']!r}"
    except ValueError:
        return "in an event"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    private = parser.add_mutually_exclusive_group()
    private.add_argument("--private", action="store_true", help="with [privacy], noise from a seed")
    private.add_argument("--secret", action="store_true", help="with [privacy], secret noise")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    chosen = parser.parse_args()
    kills = 10 if chosen.quick else chosen.kills
    torch.set_num_threads(1)
    draw, places, hashes, tried, counted = random.Random(0), Counter[str](), list[str | None](), 0, 0
    is_private = chosen.private or chosen.secret
    changes = FEWER | (PRIVATE if is_private else {}) | ({"privacy.seed": None} if chosen.secret else {})
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        federation = build_federation(small_settings(write_base(root / "base"), changes))
        _, _, used = os.wait4(forked(lambda: carry_out(federation, root / "whole")), 0)
        length, expected = used.ru_utime + used.ru_stime, hash_of(root / "whole")
        assert expected is not None, "the uninterrupted run failed"
        done = 0
        while done < kills:
            folder, tried = root / f"run-{tried}", tried + 1
            pid = forked(lambda folder=folder: carry_out(federation, folder))
            end, ended = draw.uniform(0, length), 0
            while not ended and cpu_seconds(pid) < end:
                time.sleep(0.001)
                ended, _ = os.waitpid(pid, os.WNOHANG)
            if ended:
                continue
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                continue  # it had just ended
            done += 1
            places[where(folder)] += 1
            os.waitpid(forked(lambda folder=folder: carry_out(federation, folder)), 0)
            hashes.append(hash_of(folder))
            counted += not is_private or (hashes[-1] is not None and accounted(folder, federation.settings))
            if done % 20 == 0:
                print(f"{done} killed", flush=True)
    for place, count in places.most_common():
        print(f"{count:5d}  killed {place}")
    same, different = hashes.count(expected), len({*hashes, expected} - {None}) - 1
    print(f"{same}/{kills} resumed to the same hash, {expected}; {different} to another, each its own")
    if is_private:
        print(f"{counted}/{kills} with a salt per attempt and an epsilon that counts every model that went out")
    if chosen.out:
        found = {"kills": kills, "same_hash": same, "killed": dict(places), "adapter_sha256": expected}
        atomic_write(chosen.out, encode_json(found, indent=1))
    sys.exit((different if chosen.secret else same) != kills or counted != kills)


if __name__ == "__main__":
    main()
