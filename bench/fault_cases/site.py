"""A SuperLink and SuperNodes as they are deployed, on localhost: started, asked, killed."""

import datetime
import json
import re
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from ubsmoe.engines.flower import keys
from ubsmoe.engines.flower.app import write_app
from ubsmoe.engines.flower.endings import descendants, kill
from ubsmoe.engines.flower.localhost import (
    LocalFederation,
    free_port,
    superlink_options,
    supernode_options,
)
from ubsmoe.engines.flower.programs import Programs, flower_command, flower_environment
from ubsmoe.engines.flower.resident import stop_residents

PATIENCE = (
    600.0  # seconds for a process of Flower's to do what it does in five, on a machine that does other things too
)
SECRET = "a-token-that-no-log-may-hold"
NODES = ("node-0", "node-1")
OTHERS = ("untrusting", "revoked")  # registered, and not started with the site


class Site:
    """A SuperLink on a database, and what is started beside it. Logs are in `home`, all processes end with `stack`."""

    def __init__(self, root: Path, run_file: Path, stack: ExitStack) -> None:
        self.home, self.app, self.stack, self.port = root / "home", root / "app", stack, free_port()
        self.residents = Path(stack.enter_context(TemporaryDirectory(prefix="ubsmoe-")))
        stack.callback(stop_residents, self.residents)
        keys.make_keys(self.home, ["127.0.0.1"], [*NODES, *OTHERS])
        write_app(run_file, self.app, {"train.rounds": 4, "rounds.quorum": 0.5, "rounds.deadline_seconds": 600})
        trust = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{self.home / keys.CA}"\n'
        (self.home / "config.toml").write_text(f"[superlink.localhost]\n{trust}")
        nothing = Programs(self.home, self.app, {}, print)  # this site starts its processes itself
        self.flower = LocalFederation("localhost", self.home, self.app, len(NODES), simulated=False, programs=nothing)
        self.superlink = self.start_superlink()
        named = (*NODES, *OTHERS)
        self.numbers = {
            name: self.flower.flwr("supernode", "register", self.key(name, ".pub"))["node-id"] for name in named
        }

    def key(self, name: str, suffix: str = "") -> str:
        """Where a node's private key is, or with .pub its public one."""
        return str(self.home / f"{name}{suffix}")

    def start(self, name: str, program: str, options: list[str]) -> "subprocess.Popen[bytes]":
        """A process in a session of its own, so that it can be killed with all that it has started."""
        environment = {**flower_environment(self.home, self.residents), "HF_TOKEN": SECRET}
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                flower_command(program, *options), env=environment, cwd=self.app, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.stack.callback(power_off, process, patience=10)
        return process

    def start_superlink(self) -> "subprocess.Popen[bytes]":
        """The SuperLink, on the database that it may have left behind, once it answers."""
        options = [*superlink_options(self.home, self.port), "--database", str(self.home / "superlink.db")]
        process = self.start("superlink", "flower-superlink", options)
        until(lambda: self.post("/health", None) == 200, "the SuperLink")
        return process

    def start_node(self, i: int, port: int | None = None) -> "subprocess.Popen[bytes]":
        """Node i, maybe by way of a proxy's port."""
        config = {"partition-id": i, "num-partitions": len(NODES), "resident-seconds": 600}
        options = supernode_options(self.home, self.home / NODES[i], port or self.port, config)
        return self.start(NODES[i], "flower-supernode", options)

    def online(self) -> set[str]:
        """The numbers of the nodes that are."""
        return {
            node["node-id"] for node in self.flower.flwr("supernode", "list")["nodes"] if node["status"] == "online"
        }

    def run(self, out: Path, **changes: Any) -> "subprocess.Popen[bytes]":
        """`flwr run` of the app, its run folder at `out`."""
        config = {"out": str(out), "join-seconds": 120, **changes}
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return self.start("run", "flwr", ["run", str(self.app), "localhost", "--stream", "--run-config", words])

    def said(self, name: str) -> list[str]:
        """The lines of a process's log."""
        lines = (self.home / f"{name}.log").read_text(errors="replace").splitlines()
        return [re.sub("\x1b[^m]*m", "", line).strip() for line in lines]

    def post(self, path: str, request: Any, key: str = NODES[0], age: float = 0.0) -> int:
        """The status that the SuperLink answers a request with, signed `age` seconds ago by a node."""
        headers = {"Content-Type": "application/protobuf", "Accept": "application/protobuf"}
        if request is not None:
            private: Any = load_ssh_private_key(Path(self.key(key)).read_bytes(), None)
            signed = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)).isoformat()
            headers["flwr-timestamp"] = signed
            headers["flwr-public-key"] = b64encode(public_key_to_bytes(private.public_key())).decode()
            headers["flwr-signature"] = b64encode(sign_message(private, signed.encode())).decode()
        body = None if request is None else request.SerializeToString()
        asked = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=20, context=trusting(self.home)) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return int(error.code)
        except OSError:
            return 0


def power_off(process: "subprocess.Popen[bytes]", patience: float = 0.0) -> None:
    """kill -9 of a process and all that it has started, as if its machine had lost its power; asked to end first, given time."""
    family = descendants(process.pid)
    if patience:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    kill(family if process.poll() is not None else [process.pid, *family])
    process.wait()


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    limit = time.monotonic() + seconds
    while not true():
        if time.monotonic() > limit:
            raise TimeoutError(what)
        time.sleep(0.5)


def trusting(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=folder / keys.CA)


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines() if (out / "events.jsonl").exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == name]
