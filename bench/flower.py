"""What Flower adds to a round on localhost, and whether 100 MB pass.

    overhead   seconds of a round beyond its slowest client's training, SuperLink + 2 SuperNodes with TLS: with the resident
               process, without it, and Flower's own minimum, an app whose messages are empty and whose nodes do nothing
               (Grid.send_and_receive, which looks for answers every 3 s)
    large      one round whose task and update are 100 MB each

python bench/flower.py [--quick] [overhead large]    prints, writes bench/results/flower.json
Who must not get in: bench/faults.py --only G.
"""

import argparse
import json
import os
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ubsmoe.engines.flower.app import PYPROJECT, write_app
from ubsmoe.engines.flower.localhost import local_federation

RESULTS = Path(__file__).resolve().parent / "results" / "flower.json"
RUN = """
threads = 1
[adapter]
rank = {rank}
[tiers]
budgets = [0.5, 1.0]
[clients]
count = 2
[data.synthetic]
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
    with local_federation(empty, 2, simulated=False, log=note) as federation:
        federation.run()
    found["flower_minimum"] = {"round_seconds": json.loads((folder / "empty.json").read_text())}
    run_file = folder / "run.toml"
    run_file.write_text(RUN.format(rank=8, rounds=rounds))
    for name, config in {"with_resident": {"resident-seconds": 600}, "without_resident": {}}.items():
        found[name] = one_run(folder / name.replace("_", "-"), run_file, config)
    for row in found.values():
        if isinstance(row, dict):
            row["median_round_seconds"] = statistics.median(row["round_seconds"])
            beyond = row.get("beyond_training_seconds", row["round_seconds"])
            row["median_beyond_training_seconds"] = statistics.median(beyond)
    return found


def one_run(app: Path, run_file: Path, config: dict[str, Any]) -> dict[str, Any]:
    write_app(run_file, app, {})
    with local_federation(app, 2, simulated=False, log=note, node_config=lambda node: config) as federation:
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
    timings = one_run(folder / "large", run_file, {"resident-seconds": 600})
    size = (folder / "large" / "out" / "adapter.safetensors").stat().st_size
    assert size >= 100_000_000, size
    return {"adapter_bytes": size, **timings}


def adapter_bytes(rank: int) -> int:
    from ubsmoe.config import parse_run
    from ubsmoe.server.federation import build_server
    from ubsmoe.server.start import start_state

    server = build_server(parse_run({"adapter": {"rank": rank}, "data": {"synthetic": {"test_examples": 8}}}))
    return sum(tensor.nbytes for tensor in start_state(server).adapters.values())


def note(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["overhead", "large"], default=[])
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    parts = options.parts or ["overhead", "large"]
    record = json.loads(options.out.read_text()) if options.out.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        for part in parts:
            work = Path(name) / part
            work.mkdir()
            began, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
            found = overhead(work, 3 if options.quick else 10) if part == "overhead" else large(work)
            record[part] = {"date": began, "load_average_at_start": round(load, 1), **found}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key in parts}, indent=1))


if __name__ == "__main__":
    main()
