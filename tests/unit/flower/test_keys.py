"""Keys that Flower and TLS accept, and that nobody else can read."""

import contextlib
import datetime
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from ubsmoe.engines.flower import keys


def test_private_keys_are_their_owners_and_the_rest_stays_when_more_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    made = keys.make_keys(folder, ["127.0.0.1", "superlink.example.org"], ["a"])
    assert {path.name for path in made} == {"ca.crt", "ca.key", "server.pem", "server.key", "a", "a.pub"}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in ("ca.key", "server.key", "a"))
    before = {path.name: path.read_bytes() for path in made}
    assert {path.name for path in keys.make_keys(folder, ["other"], ["a", "b"])} == {"b", "b.pub"}
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_a_nodes_halves_belong_together_and_no_two_nodes_share_a_key(tmp_path: Path) -> None:
    keys.make_keys(tmp_path, ["localhost"], ["a", "b"])
    points = set()
    for name in ("a", "b"):
        private = load_ssh_private_key((tmp_path / name).read_bytes(), password=None)
        public = load_ssh_public_key((tmp_path / f"{name}.pub").read_bytes())
        assert private.public_key().public_numbers() == public.public_numbers()
        points.add(public.public_numbers().x)
    assert len(points) == 2


def test_the_server_certificate_is_for_its_hosts_and_signed_by_the_authority(tmp_path: Path) -> None:
    keys.make_keys(tmp_path, ["127.0.0.1", "superlink.example.org"], [])
    server = x509.load_pem_x509_certificate((tmp_path / keys.SERVER).read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / keys.CA).read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("hosts", "days", "other", "reason"),
    [
        (["localhost"], 1, False, None),
        (["localhost"], -1, False, "certificate has expired"),
        (["elsewhere"], 1, False, "Hostname mismatch"),
        (["localhost"], 1, True, "unable to get local issuer|self.signed|signature failure"),
    ],
)
def test_a_client_trusts_this_server_and_no_other(
    hosts: list[str], days: float, other: bool, reason: str | None, tmp_path: Path
) -> None:
    keys.make_authority(tmp_path)
    keys.make_server_certificate(tmp_path, hosts, days)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / keys.SERVER, tmp_path / keys.SERVER_KEY)
    if other:
        keys.make_authority(tmp_path)
    client = ssl.create_default_context(cafile=tmp_path / keys.CA)
    if reason is None:
        shake_hands(client, server)
    else:
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            shake_hands(client, server)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    """TLS between two ends in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname="localhost"), server.wrap_bio(up, down, server_side=True)]
    for _ in range(8):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert ends[0].getpeercert()


def test_the_certificate_is_valid_now_and_for_as_long_as_said(tmp_path: Path) -> None:
    keys.make_authority(tmp_path)
    keys.make_server_certificate(tmp_path, ["localhost"], days=365)
    found = x509.load_pem_x509_certificate((tmp_path / keys.SERVER).read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    assert found.not_valid_before_utc < now - datetime.timedelta(hours=23)
    left = found.not_valid_after_utc - now
    assert datetime.timedelta(days=364, hours=23) < left <= datetime.timedelta(days=365)


def test_ssh_keygen_reads_the_key(tmp_path: Path) -> None:
    from shutil import which

    if which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen here")
    public = keys.make_node_key(tmp_path, "a")
    done = subprocess.run(["ssh-keygen", "-l", "-f", str(public)], capture_output=True, text=True)
    assert done.returncode == 0 and "ECDSA" in done.stdout
