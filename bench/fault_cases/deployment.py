"""G: a SuperLink and SuperNodes as they are deployed, on localhost: who must not get in, what is replayed, who dies.

Real processes of Flower's with TLS and registered keys, so this takes minutes.
"""

import json
import re
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import GetNodesRequest

from fault_cases.disk import carry_out, hash_of
from fault_cases.matrix import DROPPED, REFUSED, RESUMED, Row, judge
from fault_cases.site import PATIENCE, SECRET, Site, events, power_off, trusting, until
from ubsmoe.config import load_run
from ubsmoe.engines.flower import keys
from ubsmoe.engines.flower.localhost import free_port, superlink_options, supernode_options
from ubsmoe.server.federation import build_federation

RUN = """
seed = 3
threads = 1
[model]
base = {base}
[adapter]
rank = 3
[tiers]
budgets = [0.5, 1.0]
[clients]
count = 2
[data.synthetic]
entities = 8
train_examples = 40
test_examples = 8
[train]
rounds = 4
local_steps = 1
batch_size = 2
[evaluate]
max_new_tokens = 1
max_examples = 1
mc_accuracy = false
"""


def replaying(site: Site) -> tuple[int, list[int]]:
    """A proxy in front of the SuperLink that sends a node's answers again, once it asks for more work.

    Its port, and the statuses that the second ones got.
    """
    kept: list[tuple[str, bytes, dict[str, str]]] = []
    again: list[int] = []

    class Replaying(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = self.path, body, dict(self.headers)
            if self.path.endswith("pull-messages"):
                again.extend(self.forward(*old)[0] for old in kept)
                kept.clear()
            elif self.path.endswith(("push-messages", "push-object")):
                kept.append(request)
            status, content = self.forward(*request)
            self.send_response(status)
            self.send_header("Content-Type", "application/protobuf")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def forward(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
            line = HTTPSConnection("127.0.0.1", site.port, timeout=60, context=trusting(site.home))
            try:
                line.request("POST", path, body, headers)
                reply = line.getresponse()
                return reply.status, reply.read()
            finally:
                line.close()

        def log_message(self, *_: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A node that was killed leaves a broken line."""

    server = Quiet(("127.0.0.1", 0), Replaying)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.home / keys.SERVER, site.home / keys.SERVER_KEY)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    site.stack.callback(server.shutdown)
    return server.server_port, again


def deployment(root: Path, base: Path) -> Iterator[Row]:
    """All of G."""
    run_file = root / "deployed.toml"
    run_file.write_text(RUN.format(base=json.dumps(str(base))))
    carry_out(build_federation(load_run(run_file, {})), root / "here")
    expected = hash_of(root / "here")
    with ExitStack() as stack:
        site = Site(root, run_file, stack)
        port, again = replaying(site)
        nodes = [site.start_node(0), site.start_node(1, port)]
        until(lambda: len(site.online()) == 2, "two nodes")
        out = root / "replayed"
        site.run(out).wait()
        counted = len(events(out, "client"))
        same = hash_of(out) == expected and counted == 8 and len(again) > 8
        reason = f"{len(again)} requests sent again, answered {sorted(set(again))}; {counted} updates counted"
        yield judge("G", "replay", "counts once, the same hash", same, reason)
        yield from misuse(site)
        yield from strangers(site, root)
        yield from deaths(site, nodes, root, expected)
        yield unspoken(site, root)


def misuse(site: Site) -> Iterator[Row]:
    """What a registered node may not ask for, though its key is good and the request well made."""
    path, itself = "/v1/fleet/send-node-heartbeat", Node(node_id=int(site.numbers["node-0"]))
    beat = SendNodeHeartbeatRequest(node=itself, heartbeat_interval=30)
    own = site.post(path, beat)
    old = site.post(path, beat, age=400)
    yield judge("G", "replay, minutes later", REFUSED, (own, old) == (200, 401), f"now {own}, later {old}", beyond=True)
    anothers = site.post(path, beat, key="node-1")
    server = site.post("/v1/runtime/get-nodes", GetNodesRequest())
    reason = f"another node's name {anothers}, the server's own interface {server}"
    yield judge("G", "role without right", REFUSED, anothers == 401 and server in (401, 403), reason)


def strangers(site: Site, root: Path) -> Iterator[Row]:
    """Nodes and servers that must not get in; the two honest nodes stay the only ones online."""
    other, expired = root / "other", root / "expired"
    keys.make_keys(other, ["127.0.0.1"], ["stranger"])
    keys.make_keys(expired, ["127.0.0.1"], [])
    (expired / keys.SERVER).unlink(), (expired / keys.SERVER_KEY).unlink()
    keys.make_server_certificate(expired, ["127.0.0.1"], days=-1)

    def node(key: Path | str, trust: Path = site.home, port: int = site.port) -> list[str]:
        return [*supernode_options(trust, Path(key), port, {}), "--max-retries", "1"]

    def without(options: list[str], name: str) -> list[str]:
        at = options.index(name)
        return [*options[:at], *options[at + 2 :]]

    def turned_away(
        fault: str, options: list[str], words: str, program: str = "flower-supernode", beyond: bool = False
    ) -> Row:
        name = re.sub(r"\W+", "-", fault)
        process = site.start(name, program, options)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        reason = next((line for line in reversed(site.said(name)) if words in line), "")
        holds = bool(reason) and process.poll() not in (None, 0) and len(site.online()) == 2
        power_off(process)
        return judge("G", fault, REFUSED, holds, reason[max(0, reason.find(words) - 40) :][:120], beyond)

    known = node(site.key("untrusting"))
    bare = without(known, "--root-certificates")
    yield turned_away("wrong CA", node(site.key("untrusting"), trust=other), "CERTIFICATE_VERIFY_FAILED")
    yield turned_away("no CA", bare, "CERTIFICATE_VERIFY_FAILED", beyond=True)
    yield turned_away("plaintext node with a key", [*bare, "--insecure"], "requires a secure TLS", beyond=True)
    keyless = without([*bare, "--insecure"], "--auth-supernode-private-key")
    yield turned_away("plaintext node without one", keyless, "Connection attempt failed", beyond=True)
    yield turned_away("unknown key", node(other / "stranger"), "code: 2004")
    anywhere = ["--host", "0.0.0.0", "--port", str(free_port()), "--insecure", "--enable-supernode-auth"]
    yield turned_away("plaintext off loopback", anywhere, "ssl-certfile", "flower-superlink")
    old = free_port()
    server = site.start("expired-server", "flower-superlink", superlink_options(expired, old))
    until(lambda: any("running on" in line for line in site.said("expired-server")), "the expired server")
    yield turned_away("expired certificate", node(site.key("untrusting"), expired, old), "certificate has expired")
    power_off(server)

    process = site.start("revoked-running", "flower-supernode", node(site.key("revoked")))
    until(lambda: len(site.online()) == 3, "the node that is revoked")
    site.flower.flwr("supernode", "unregister", str(site.numbers["revoked"]))
    until(lambda: len(site.online()) == 2, "the node that was revoked")
    power_off(process)
    yield turned_away("revoked node", node(site.key("revoked")), "code: 2004")


def deaths(site: Site, nodes: list["subprocess.Popen[bytes]"], root: Path, expected: str | None) -> Iterator[Row]:
    """kill -9 of a node in mid-round, and of the server with its app."""
    out = root / "node-killed"
    running = site.run(out, **{"train.rounds": 12, "rounds.deadline_seconds": 30})
    until(lambda: bool(events(out, "round")), "round 1")
    power_off(nodes[1])
    until(
        lambda: len(site.online()) == 1, "a node that is missed"
    )  # until then the SuperLink wants no second one of that key
    site.start_node(1)
    running.wait()
    lost, rounds = events(out, "dropped"), events(out, "round")
    alone = {event["client"] for event in lost} == {"client-1"}
    yield judge("G", "SuperNode killed -9", DROPPED, alone and len(rounds) == 12, lost[0]["reason"], beyond=True)
    back = any(event["client"] == "client-1" and event["round"] > lost[0]["round"] for event in events(out, "client"))
    yield judge("G", "SuperNode back again", "counts again in a later round", back, beyond=True)

    out = root / "server-killed"
    until(lambda: len(site.online()) == 2, "two nodes")
    running = site.run(out)
    until(lambda: len(events(out, "round")) == 2, "round 2")
    power_off(site.superlink)
    power_off(running)
    done = hash_of(out) is not None
    site.superlink = site.start_superlink()
    until(lambda: len(site.online()) == 2, "nodes that find the server again")
    site.run(out).wait()
    yield judge("G", "SuperLink and ServerApp killed -9", RESUMED, hash_of(out) == expected and not done, beyond=True)


def unspoken(site: Site, root: Path) -> Row:
    """No log, event or record of a run holds a private key or a token of the environment."""
    keys_of_all = b"".join(Path(site.key(name)).read_bytes() for name in (*site.numbers, keys.SERVER_KEY, keys.CA_KEY))
    private = [line for line in keys_of_all.split(b"\n") if len(line) > 60]
    texts = [*site.home.glob("*.log"), *(path for path in root.rglob("*.json*") if site.home not in path.parents)]
    held = [path.name for path in texts if any(word in path.read_bytes() for word in (SECRET.encode(), *private))]
    reason = f"{len(texts)} logs and records looked at" if not held else f"in {', '.join(held)}"
    return judge("G", "secret in a log", "none is written", len(private) > 8 and not held, reason)
