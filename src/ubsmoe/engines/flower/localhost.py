"""A local federation (localhost) to try a Flower app with: processes of its own, which are stopped on leaving it.

There are two kinds. Flower's `config.toml`, in its home folder, names either `localhost`:

    simulation   a SuperLink that simulates its nodes with Ray, in plaintext
    deployment   a SuperLink and one SuperNode process per node, TLS, and a registered key for every node
"""

import json
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe import progress
from ubsmoe.engines.flower.app import plug_ins_of
from ubsmoe.engines.flower.endings import ended_in_order, owned_folder
from ubsmoe.engines.flower.keys import CA, SERVER, SERVER_KEY, make_keys
from ubsmoe.engines.flower.programs import (
    LOOK_SECONDS,
    SUPERLINK,
    FlowerFailure,
    Programs,
    flower_command,
    flower_environment,
    owned,
)
from ubsmoe.engines.flower.resident import stop_residents
from ubsmoe.storage import disk

HEALTHY_SECONDS = 180.0
IDLE_SECONDS = 600  # how long a resident process stays without work
FAILED = ("finished:failed", "finished:stopped")  # what Flower calls the status of a run that came to nothing


@dataclass(frozen=True)
class LocalFederation:
    """A local federation that is running.

    `name` is its connection's in Flower's home folder `home`, `nodes` how many there are, `simulated` which kind it is.
    """

    name: str
    home: Path
    app: Path
    nodes: int
    simulated: bool
    programs: Programs

    def run(self, changes: Mapping[str, Any] | None = None) -> None:
        """`flwr run` the app and show its log until it has ended. Raises FlowerFailure if Flower refuses the app."""
        options = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
        command = ["run", str(self.app), self.name, "--stream"]
        command += ["--run-config", " ".join(options)] if options else []
        if self.simulated:
            command += ["--federation-config", f"num-supernodes={self.nodes} client-resources-num-cpus=1"]
        progress.at("")  # flwr writes to the same terminal
        with subprocess.Popen(flower_command("flwr", *command), env=flower_environment(self.home)) as process:
            while process.poll() is None:
                self.programs.look_after()
                time.sleep(LOOK_SECONDS)
        if process.returncode:
            raise FlowerFailure(f"flwr run failed; see above, and the logs in {self.home}")
        last = max(self.flwr("list")["runs"], key=lambda run: str(run["pending-at"]), default={"status": "unknown"})
        if last["status"] in FAILED:  # flwr run itself ends with 0
            raise FlowerFailure(
                f"the run ended as {last['status']!r}; the lines above say why, or {self.home}/superlink.log"
            )

    def flwr(self, *words: str) -> Any:
        """What a `flwr` command says in JSON. Raises FlowerFailure if it fails."""
        command = flower_command("flwr", *words, self.name, "--format", "json")
        done = subprocess.run(command, env=flower_environment(self.home), check=False, capture_output=True, text=True)
        try:
            said = json.loads(done.stdout)
        except ValueError:
            said = {}
        if done.returncode or not said.get("success"):
            raise FlowerFailure(f"flwr {' '.join(words)}: {said.get('error-message') or done.stderr or done.stdout}")
        return said


@contextmanager
def local_federation(
    app: Path,
    nodes: int,
    simulated: bool,
    log: Callable[[str], None] = print,
    node_config: Callable[[int], Mapping[str, Any]] | None = None,
    home: Path | None = None,
) -> Iterator[LocalFederation]:
    """Start a federation, wait until it is healthy, and stop it, and nothing else, on leaving.

    Args:
        app: a Flower app's folder; Flower's home is `.flwr` inside it, which Flower does not ship to nodes.
        nodes: how many.
        simulated: which kind.
        log: called with a line for what is started, and when a program ends.
        node_config: what a node's configuration says beside partition-id and num-partitions; for a deployment. When left out,
            a node stays resident, and runs the plug-ins that the app names: all nodes are on this machine.
        home: Flower's home, if not inside the app's folder.

    Raises:
        FlowerFailure: if a process dies or is not healthy in time, or the home is another federation's.
    """
    home = (home or app / ".flwr").absolute()
    if node_config is None:
        here = {"resident-seconds": IDLE_SECONDS, "plug-ins": plug_ins_of(app)}
        node_config = lambda _: here  # noqa: E731
    disk.make_folder(home)
    home.chmod(0o700)
    port = free_port()
    trust = "insecure = true" if simulated else f"root-certificates = {json.dumps(str(home / CA))}"
    with ExitStack() as stack:
        stack.enter_context(closing(owned(home)))
        stack.enter_context(ended_in_order())
        programs = Programs(home, app, flower_environment(home, stack.enter_context(_residents())), log)
        stack.callback(programs.stop)
        found = LocalFederation("localhost", home, app, nodes, simulated, programs)
        config = f'[superlink.localhost]\naddress = "127.0.0.1:{port}"\n{trust}\n'
        disk.atomic_write(home / "config.toml", config.encode())
        if not simulated:
            make_keys(home, ["127.0.0.1", "localhost"], [_node(i) for i in range(nodes)])
        log("starts the SuperLink")
        programs.start(SUPERLINK, "flower-superlink", superlink_options(None if simulated else home, port))
        authority = None if simulated else home / CA
        _wait(lambda: _answers(port, authority), programs, "the SuperLink")
        for i in range(0 if simulated else nodes):
            log(f"starts {_node(i)}")
            found.flwr("supernode", "register", str(home / f"{_node(i)}.pub"))
            keys = {"signing-key": str(home / _node(i)), "peer-keys": str(home)}
            own = {"partition-id": i, "num-partitions": nodes, **keys, **node_config(i)}
            programs.start(_node(i), "flower-supernode", supernode_options(home, home / _node(i), port, own))
        _wait(lambda: simulated or _online(found) == nodes, programs, f"{nodes} SuperNodes")
        log(f"{nodes} {'simulated nodes' if simulated else 'SuperNodes'} at 127.0.0.1:{port}")
        yield found


def superlink_options(keys: Path | None, port: int) -> list[str]:
    """How a SuperLink is started on localhost: with the keys of a folder, or in plaintext to simulate its nodes."""
    options = ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    if keys is None:
        return [*options, "--insecure", "--simulation"]
    files = ["--ssl-ca-certfile", keys / CA, "--ssl-certfile", keys / SERVER, "--ssl-keyfile", keys / SERVER_KEY]
    return [*options, *map(str, files), "--enable-supernode-auth"]


def supernode_options(keys: Path, key: Path, port: int, config: Mapping[str, Any]) -> list[str]:
    """How a SuperNode is started: the authority that it trusts, its key, the SuperLink's address."""
    options = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", str(keys / CA), "--port", str(free_port())]
    words = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    return [*options, "--auth-supernode-private-key", str(key), "--node-config", words]


@contextmanager
def _residents() -> Iterator[Path]:
    """A folder for the nodes' resident processes, which are asked to end on leaving."""
    with owned_folder() as folder:
        try:
            yield folder
        finally:
            stop_residents(folder)


def _node(i: int) -> str:
    return f"node-{i}"


def _online(found: LocalFederation) -> int:
    return sum(node["status"] == "online" for node in found.flwr("supernode", "list")["nodes"])


def _wait(ready: Callable[[], bool], programs: Programs, what: str) -> None:
    end = time.monotonic() + HEALTHY_SECONDS
    while not ready():
        programs.check()
        if time.monotonic() > end:
            raise FlowerFailure(f"not healthy within {HEALTHY_SECONDS:g} s: {what}; see the logs in {programs.home}")
        time.sleep(LOOK_SECONDS)


def _answers(port: int, certificate: Path | None) -> bool:
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    scheme = "https" if certificate else "http"
    try:
        with urllib.request.urlopen(f"{scheme}://127.0.0.1:{port}/health", timeout=2, context=context) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
