"""What happens to a run on Flower while its machines change: a SuperLink and four SuperNodes with TLS on localhost.

    after round 2   node-3 is killed (kill -9)
    after round 4   node-4 is added, with a key and data of its own
    after round 7   node-1 is unregistered, and node-5 with another key takes its client's place
    after round 17  node-2 is started again, as by `ubsmoe flower restart`

Each node is a client with a file of its own. Seconds are the server's, from one round's end to the next, without evaluation.

python bench/flower_changes.py [--deadline 30]    prints `flower status` and the stream, writes bench/results/flower_changes.json
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from ubsmoe.engines.flower.app import write_app
from ubsmoe.engines.flower.endings import descendants, kill
from ubsmoe.engines.flower.keys import make_keys
from ubsmoe.engines.flower.localhost import LocalFederation, local_federation, supernode_options
from ubsmoe.engines.flower.programs import request_restart
from ubsmoe.report.federation import status_of, status_table
from ubsmoe.storage.runfolder import is_run, read_run

RESULTS = Path(__file__).resolve().parent / "results" / "flower_changes.json"
BUDGETS = (0.25, 0.5, 1.0)
RUN = """
threads = 1
[model]
base = "ubsmoe-tiny"
[tiers]
budgets = [0.25, 0.5, 1.0]
[clients]
count = 5
[rounds]
quorum = 0.2
deadline_seconds = {deadline}
[data.synthetic]
entities = 8
test_examples = 8
[method]
name = "ubsmoe"
[train]
rounds = 24
local_steps = 2
batch_size = 4
[evaluate]
before = false
max_examples = 4
max_new_tokens = 4
"""


class Changes:
    """The changes to a federation; `notes` says when each was made."""

    def __init__(self, federation: LocalFederation, app: Path, residents: Callable[[int], dict[str, Any]]) -> None:
        self.federation, self.app, self.config = federation, app, residents
        self.notes: list[dict[str, Any]] = []

    def kill(self) -> None:
        """node-3 and all that it has started."""
        process = self.federation.programs.running["node-3"]
        kill([process.pid, *descendants(process.pid)])

    def start(self, number: int, client: int) -> None:
        """A node with a new key, as client `client`."""
        home, name = self.federation.home, f"node-{number}"
        make_keys(home, [], [name])
        self.federation.flwr("supernode", "register", str(home / f"{name}.pub"))
        port = int((home / "config.toml").read_text().split("127.0.0.1:")[1].split('"')[0])
        options = supernode_options(home, home / name, port, self.config(client))
        self.federation.programs.start(name, "flower-supernode", options)

    def replace(self) -> None:
        """node-1 is taken out; node-5 is its client from now on."""
        for node in self.federation.flwr("supernode", "list")["nodes"]:
            if node["node-id"] == self._node_of("ward-1"):
                self.federation.flwr("supernode", "unregister", str(node["node-id"]))
        self.start(5, 1)

    def _node_of(self, client: str) -> str:
        nodes = read_run(self.app / "out").named("nodes")[-1]["nodes"]
        return next(str(one["node"]) for one in nodes if one["client"] == client)

    def follow(self) -> None:
        """Make each change after its round, and show what `ubsmoe flower status` says before it."""
        plan: dict[int, tuple[str, Callable[[], Any]]] = {
            2: ("node-3 is killed", self.kill),
            4: ("node-4 is added", lambda: self.start(4, 4)),
            7: ("node-1 is replaced by node-5", self.replace),
            17: ("node-2 is started again", lambda: request_restart(self.app, "node-2")),
        }
        while plan:
            time.sleep(0.2)
            done = len(read_run(self.app / "out").rounds) if is_run(self.app / "out") else 0
            for number in [number for number in plan if number <= done]:
                what, change = plan.pop(number)
                self.show()
                print(f"--- after round {number}: {what}", flush=True)
                change()
                self.notes.append({"after_round": number, "change": what})

    def show(self) -> None:
        """What `ubsmoe flower status` says."""
        Console(width=80).print(status_table(status_of(read_run(self.app / "out"), []), 80))


def records(folder: Path) -> Callable[[int], dict[str, Any]]:
    """The configuration of client i, with a file of its own."""

    def config(i: int) -> dict[str, Any]:
        own = [{"instruction": f"{a} + {i} =", "input": "", "output": str(a + i)} for a in range(20 + i)]
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, own)))
        place = str(folder / f"{i}.jsonl")
        return {"client": f"ward-{i}", "budget": BUDGETS[i % 3], "data.train": place, "resident-seconds": 600}

    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=30.0, help="rounds.deadline_seconds")
    deadline = parser.parse_args().deadline
    with tempfile.TemporaryDirectory() as name:
        folder, app = Path(name), Path(name) / "app"
        (folder / "run.toml").write_text(RUN.format(deadline=deadline))
        write_app(folder / "run.toml", app, {})
        config = records(folder)
        with local_federation(app, 4, simulated=False, node_config=config) as federation:
            changes = Changes(federation, app, config)
            follower = threading.Thread(target=changes.follow, daemon=True)
            follower.start()
            federation.run({"join-seconds": 240})
            follower.join(5)
            changes.show()
        record = read_run(app / "out")
        rounds = [
            {
                "round": event["round"],
                "seconds": round(event["seconds"], 1),
                "counted": [one["client"] for one in record.clients if one["round"] == event["round"]],
                "dropped": [one["client"] for one in record.dropped if one["round"] == event["round"]],
            }
            for event in record.rounds
        ]
    found = {"deadline_seconds": deadline, "rounds": rounds, "changes": changes.notes}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
