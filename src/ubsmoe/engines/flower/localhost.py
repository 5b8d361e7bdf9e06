"""A local federation (localhost) to try a Flower app with: processes of its own, which are stopped on leaving it.

There are two kinds. Flower's `config.toml`, in its home folder, names either `localhost`:

    simulation   a SuperLink that simulates its nodes with Ray, in plaintext
    deployment   a SuperLink and one SuperNode process per node, TLS, and a registered key for every node
"""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ubsmoe.engines.flower.app import QUIET, plug_ins_of
from ubsmoe.engines.flower.endings import FOLDER, descendants, ended_in_order, kill, owned_folder
from ubsmoe.engines.flower.keys import CA, SERVER, SERVER_KEY, make_keys
from ubsmoe.engines.flower.resident import stop_residents
from ubsmoe.errors import UserError, require
from ubsmoe.storage import disk

HEALTHY_SECONDS = 180.0
IDLE_SECONDS = 600  # how long a resident process stays without work
STOP_SECONDS = 10.0
LOOK_SECONDS = 0.5
SUPERLINK = "superlink"
FAILED = ("finished:failed", "finished:stopped")  # what Flower calls the status of a run that came to nothing


class FlowerFailure(UserError):
    """A process of Flower failed; the message names its log."""


@dataclass(frozen=True)
class LocalFederation:
    """A local federation that is running.

    `name` is its connection's in Flower's home folder `home`, `nodes` how many there are, `simulated` which kind it is. `log` gets
    a line when one of `processes` ends; `starts` holds how each is started.
    """

    name: str
    home: Path
    app: Path
    nodes: int
    simulated: bool
    log: Callable[[str], None] = print
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: dict[str, Callable[[], subprocess.Popen[bytes]]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)

    def look_after(self) -> None:
        """Say which process has ended since the last look, and start the nodes again that `request_restart` names."""
        for name, process in list(self.processes.items()):
            if (request := _request(self.home, name)).exists():
                request.unlink()
                process.terminate()
                process.wait()
                self.processes[name] = self.starts[name]()
                self.ended.discard(name)
                self.log(f"{name} is started again")
            elif process.poll() is not None and name not in self.ended:
                self.ended.add(name)
                again = f"; `ubsmoe flower restart {self.app} {name}` starts it again" if name != SUPERLINK else ""
                self.log(f"{name} has ended with {process.returncode}, {self.home}/{name}.log says why{again}")

    def run(self, changes: Mapping[str, Any] | None = None) -> None:
        """`flwr run` the app and show its log until it has ended. Raises FlowerFailure if Flower refuses the app."""
        options = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
        command = ["run", str(self.app), self.name, "--stream"]
        command += ["--run-config", " ".join(options)] if options else []
        if self.simulated:
            command += ["--federation-config", f"num-supernodes={self.nodes} client-resources-num-cpus=1"]
        with subprocess.Popen(flower_command("flwr", *command), env=flower_environment(self.home)) as process:
            while process.poll() is None:
                self.look_after()
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
        log: called with a line when all nodes are there.
        node_config: what a node's configuration says beside partition-id and num-partitions; for a deployment. When left out,
            a node stays resident, and runs the plug-ins that the app names: all nodes are on this machine.
        home: Flower's home, if not inside the app's folder.

    Raises:
        FlowerFailure: if a process dies or is not healthy in time.
    """
    home = (home or app / ".flwr").absolute()
    if node_config is None:
        here = {"resident-seconds": IDLE_SECONDS, "plug-ins": plug_ins_of(app)}
        node_config = lambda _: here  # noqa: E731
    disk.make_folder(home)
    home.chmod(0o700)
    port = free_port()
    found = LocalFederation("localhost", home, app, nodes, simulated, log)
    trust = "insecure = true" if simulated else f"root-certificates = {json.dumps(str(home / CA))}"
    disk.atomic_write(home / "config.toml", f'[superlink.localhost]\naddress = "127.0.0.1:{port}"\n{trust}\n'.encode())
    with ExitStack() as stack:
        stack.enter_context(ended_in_order())
        residents = stack.enter_context(_residents())

        def start(program: str, options: Sequence[str], name: str) -> subprocess.Popen[bytes]:
            def again() -> subprocess.Popen[bytes]:
                return stack.enter_context(
                    _process(program, options, flower_environment(home, residents), app, home / f"{name}.log")
                )

            found.starts[name] = again
            found.processes[name] = again()
            return found.processes[name]

        if not simulated:
            make_keys(home, ["127.0.0.1", "localhost"], [_node(i) for i in range(nodes)])
        superlink = start("flower-superlink", superlink_options(None if simulated else home, port), SUPERLINK)
        authority = None if simulated else home / CA
        _wait(lambda: _answers(port, authority), [superlink], f"the SuperLink, {home}/superlink.log")
        if not simulated:
            processes = [superlink]
            for i in range(nodes):
                found.flwr("supernode", "register", str(home / f"{_node(i)}.pub"))
                keys = {"signing-key": str(home / _node(i)), "peer-keys": str(home)}
                config = {"partition-id": i, "num-partitions": nodes, **keys, **node_config(i)}
                options = supernode_options(home, home / _node(i), port, config)
                processes.append(start("flower-supernode", options, _node(i)))
            _wait(lambda: _online(found) == nodes, processes, f"{nodes} SuperNodes, {home}/node-*.log")
        log(f"{nodes} {'simulated nodes' if simulated else 'SuperNodes'} at 127.0.0.1:{port}")
        yield found


def request_restart(app: Path, node: str) -> None:
    """Ask the `flower up` of an app to start one of its nodes again; it looks twice a second.

    Raises:
        FlowerFailure: if it has no such node.
    """
    home = (app / ".flwr").absolute()
    if not (home / f"{node}.pub").is_file():
        known = ", ".join(sorted(path.stem for path in home.glob("node-*.pub"))) or "none"
        raise FlowerFailure(
            f"{node!r} is no node of {app}; its nodes are: {known}. `ubsmoe flower up {app}` starts them"
        )
    disk.atomic_write(_request(home, node), b"")


def _request(home: Path, node: str) -> Path:
    return home / f"{node}.restart"


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


def flower_command(program: str, *words: str) -> list[str]:
    """Flower's programs stand beside the Python that runs this."""
    require("flwr", "flower")
    path = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if path is None:
        raise FlowerFailure(f"{program} is neither beside {sys.executable} nor on the PATH; reinstall Flower")
    return [path, *words]


def flower_environment(home: Path, residents: Path | None = None) -> dict[str, str]:
    """Flower starts more programs by name, so they must be on the path."""
    own = {
        "FLWR_HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    return {**os.environ, **QUIET, **own, **({FOLDER: str(residents)} if residents else {})}


@contextmanager
def _process(
    program: str, options: Sequence[str], environment: Mapping[str, str], folder: Path, log_file: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is asked to end on leaving, and killed if it does not, with every process that it left behind."""
    with open(log_file, "ab") as log:
        process = subprocess.Popen(
            flower_command(program, *options),
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must not reach it: it is stopped in order
        )
    try:
        yield process
    finally:
        family = descendants(process.pid)  # a SuperLink that ends leaves the app of a run that goes on
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        kill([process.pid, *family] if process.poll() is None else family)
        process.wait()


def _wait(ready: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]], what: str) -> None:
    end = time.monotonic() + HEALTHY_SECONDS
    while not ready():
        if any(process.poll() is not None for process in processes):
            raise FlowerFailure(f"a process ended at once: {what}")
        if time.monotonic() > end:
            raise FlowerFailure(f"not healthy within {HEALTHY_SECONDS:g} s: {what}")
        time.sleep(0.5)


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
