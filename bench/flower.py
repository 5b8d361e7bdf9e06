"""What Flower adds to a round on loopback, whether 100 MB pass, and what a deployment refuses.

    overhead   seconds of a round beyond its slowest client's training, SuperLink + 2 SuperNodes with TLS: with the resident
               worker, without it, and Flower's own minimum, an app whose messages are empty and whose nodes do nothing
               (Grid.send_and_receive, which looks for answers every 3 s)
    large      one round whose task and update are 100 MB each
    refusals   nodes and servers that must not get in, and what happened

python bench/flower.py [--quick] [overhead large refusals]    prints, writes bench/results/flower.json
The exit code is 1 if somebody got in who must not.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ubsmoe.deploy import keys
from ubsmoe.deploy.app import PYPROJECT, write_app
from ubsmoe.deploy.loopback import Loopback, free_port, loopback, superlink_options, supernode_options

RESULTS = Path(__file__).resolve().parent / "results" / "flower.json"
RUN = """
threads = 1
[adapter]
rank = {rank}
[tiers]
budgets = [0.5, 1.0]
[clients]
count = 2
[data.world]
entities = 8
train_examples = 40
test_examples = 8
[train]
rounds = {rounds}
local_steps = 1
batch_size = 2
[evaluate]
max_examples = 1
max_new_tokens = 2
"""
EMPTY_SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.2)
    seconds = []
    for _ in range(context.run_config["rounds"]):
        began = time.perf_counter()
        answers = grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes])
        assert len(list(answers)) == 2
        seconds.append(time.perf_counter() - began)
    Path(context.run_config["out"]).write_text(json.dumps(seconds))
"""
EMPTY_CLIENT = """
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    return Message(RecordDict(), reply_to=message)
"""


def overhead(folder: Path, rounds: int) -> dict[str, Any]:
    """Median seconds of a round, and beyond its training, for each of the three."""
    found: dict[str, Any] = {"rounds": rounds}
    empty = folder / "empty"
    empty.mkdir()
    config = f'out = "{folder}/empty.json"\nrounds = {rounds}'
    (empty / "pyproject.toml").write_text(PYPROJECT.format(name='"empty"', version="0.1.0", config=config))
    for name, text in {"server.py": EMPTY_SERVER, "client.py": EMPTY_CLIENT, "LICENSE": "none"}.items():
        (empty / name).write_text(text)
    with loopback(empty, 2, simulated=False, say=note) as federation:
        federation.run()
    found["flower_minimum"] = {"round_seconds": json.loads((folder / "empty.json").read_text())}
    run_file = folder / "run.toml"
    run_file.write_text(RUN.format(rank=8, rounds=rounds))
    for name, config in {"with_worker": {"worker-seconds": 600}, "without_worker": {}}.items():
        found[name] = one_run(folder / name.replace("_", "-"), run_file, config)
    for row in found.values():
        if isinstance(row, dict):
            row["median_round_seconds"] = statistics.median(row["round_seconds"])
            beyond = row.get("beyond_training_seconds", row["round_seconds"])
            row["median_beyond_training_seconds"] = statistics.median(beyond)
    return found


def one_run(app: Path, run_file: Path, config: dict[str, Any]) -> dict[str, Any]:
    write_app(run_file, app, {})
    with loopback(app, 2, simulated=False, say=note, node_config=lambda node: config) as federation:
        federation.run()
    events = [json.loads(line) for line in (app / "out" / "events.jsonl").read_text().splitlines()]
    rounds = [event for event in events if event["event"] == "round"]
    dropped = [event["reason"] for event in events if event["event"] == "dropped"]
    assert not dropped, dropped
    training = [
        max(e["seconds"] for e in events if e["event"] == "client" and e["round"] == r["round"]) for r in rounds
    ]
    return {
        "round_seconds": [event["seconds"] for event in rounds],
        "beyond_training_seconds": [r["seconds"] - t for r, t in zip(rounds, training, strict=True)],
    }


def large(folder: Path) -> dict[str, Any]:
    """One round with adapters of a rank that makes them 100 MB."""
    run_file = folder / "large.toml"
    per_rank = adapter_bytes(8) / 8
    rank = -(-100_000_000 // int(per_rank))
    run_file.write_text(RUN.format(rank=rank, rounds=1))
    timings = one_run(folder / "large", run_file, {"worker-seconds": 600})
    size = (folder / "large" / "out" / "adapter.safetensors").stat().st_size
    assert size >= 100_000_000, size
    return {"adapter_bytes": size, **timings}


def adapter_bytes(rank: int) -> int:
    from ubsmoe.config import parse_run
    from ubsmoe.federation import build_server
    from ubsmoe.rounds import start_state

    server = build_server(parse_run({"adapter": {"rank": rank}, "data": {"world": {"test_examples": 8}}}))
    return sum(tensor.nbytes for tensor in start_state(server).adapters.values())


@contextmanager
def process(program: str, options: list[str], home: Path) -> Iterator["subprocess.Popen[str]"]:
    """A program of Flower's with its output in a pipe, ended on leaving."""
    from ubsmoe.deploy.loopback import _command, _environment

    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(
            _command(program, *options), env=_environment(home), stdout=log, stderr=log, start_new_session=True
        )
        running.log = log  # type: ignore[attr-defined]
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(15)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def said(running: Any) -> str:
    running.log.seek(0)
    return str(running.log.read())


def refused(
    what: str, running: Any, words: tuple[str, ...], seconds: float, federation: Loopback, ends: bool = True
) -> dict[str, Any]:
    """Wait until a process has ended, or said why it does not get in. The one honest node stays the only one online."""
    end = time.monotonic() + seconds
    while (
        time.monotonic() < end and running.poll() is None and (ends or not any(word in said(running) for word in words))
    ):
        time.sleep(0.5)
    lines = [re.sub("\x1b[^m]*m", "", line).strip() for line in said(running).splitlines()]
    reason = next((line for word in words for line in reversed(lines) if word in line), None)
    row = {"case": what, "exit_code": running.poll(), "said": (reason or " ".join(lines[-3:]))[-240:]}
    until(lambda: online(federation) == 1, seconds)
    row["refused"] = reason is not None and (running.poll() not in (None, 0) or not ends)
    note(f"{'ok ' if row['refused'] else 'BAD'} {what}: exit {row['exit_code']}, {row['said']}")
    return row


REVOKED = ("code: 2004", "Connection attempt failed")
TLS = ("CERTIFICATE_VERIFY_FAILED",)


def refusals(folder: Path, wait: float) -> list[dict[str, Any]]:
    """Every case of a deployment that must be refused, against one SuperLink with one honest node."""
    app, other, expired = folder / "refusing", folder / "other-authority", folder / "expired"
    run_file = folder / "refusing.toml"
    run_file.write_text(RUN.format(rank=1, rounds=1))
    write_app(run_file, app, {})
    rows = []
    with loopback(app, 1, simulated=False, say=note) as federation:
        home = federation.home
        port = int((home / "config.toml").read_text().split("127.0.0.1:")[1].split('"')[0])
        keys.make_keys(other, ["127.0.0.1"], ["stranger"])
        for name in ("untrusting", "spare", "revoked"):
            keys.make_node_key(home, name)
            federation.flwr("supernode", "register", str(home / f"{name}.pub"))

        def node(key: Path, *extra: str, trust: Path = home, to: int = port) -> Any:
            return process(
                "flower-supernode", [*supernode_options(trust, key, to, {}), "--max-retries", "1", *extra], home
            )

        options = supernode_options(home, home / "untrusting", port, {})
        at = options.index("--root-certificates")
        with process("flower-supernode", [*options[:at], *options[at + 2 :], "--max-retries", "1"], home) as running:
            rows.append(refused("no certificate of the authority", running, TLS, wait, federation))
        with node(home / "untrusting", trust=other) as running:
            rows.append(refused("certificate of another authority", running, TLS, wait, federation))
        plain = [*options[:at], *options[at + 2 :], "--insecure", "--max-retries", "1"]
        with process("flower-supernode", plain, home) as running:
            rows.append(refused("plaintext node with a key", running, ("requires a secure TLS",), wait, federation))
        at = plain.index("--auth-supernode-private-key")
        with process("flower-supernode", [*plain[:at], *plain[at + 2 :]], home) as running:
            rows.append(refused("plaintext node at a TLS server", running, ("failed", "rror"), wait, federation))
        with node(other / "stranger") as running:
            rows.append(
                refused(
                    "key that is not registered", running, ("code: 2004", "Failed to activate"), wait, federation, 1
                )
            )

        with node(home / "revoked") as running:
            until(lambda: online(federation) == 2, wait)
            number = re.search(r"SuperNode ID: (\d+)", said(running))
            assert number is not None
            federation.flwr("supernode", "unregister", number[1])
            rows.append(refused("key revoked while its node runs", running, REVOKED, wait, federation, ends=False))
        with node(home / "revoked") as running:
            rows.append(
                refused(
                    "revoked key, started again", running, ("code: 2004", "Failed to activate"), wait, federation, 1
                )
            )

        keys.make_keys(expired, ["127.0.0.1"], [])
        keys.make_server_certificate(expired, ["127.0.0.1"], days=-1)
        old = free_port()
        with process("flower-superlink", superlink_options(expired, old), expired):
            time.sleep(min(wait, 10))
            with node(home / "spare", trust=expired, to=old) as running:
                rows.append(refused("server certificate expired", running, TLS, wait, federation))
        anywhere = ["--host", "0.0.0.0", "--port", str(free_port()), "--insecure", "--enable-supernode-auth"]
        with process("flower-superlink", anywhere, expired) as running:
            rows.append(refused("plaintext server off loopback", running, ("ssl-certfile",), wait, federation))
    return rows


def online(federation: Loopback) -> int:
    return sum(node["status"] == "online" for node in federation.flwr("supernode", "list")["nodes"])


def until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("an honest node did not come online")
        time.sleep(1)


def note(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["overhead", "large", "refusals"], default=[])
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    parts = options.parts or ["overhead", "large", "refusals"]
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        for part in parts:
            work = Path(name) / part
            work.mkdir()
            began, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
            if part == "overhead":
                found: Any = overhead(work, 3 if options.quick else 10)
            elif part == "large":
                found = large(work)
            else:
                found = {"cases": refusals(work, 60)}
            record[part] = {"date": began, "load_average_at_start": round(load, 1), **found}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key in parts}, indent=1))
    return 0 if all(row["refused"] for row in record.get("refusals", {}).get("cases", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
