"""Keys and certificates for a federation: an authority of its own, the server's certificate, one key pair per node.

TLS says who the server is: nodes trust the authority's certificate and no other. A node proves who it is with its own key,
whose public half is registered at the server. Private keys can be read by their owner only.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from ubsmoe.errors import require
from ubsmoe.storage import disk

require("cryptography", "flower")
# ruff: noqa: E402
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"


def make_keys(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> list[Path]:
    """Make what is not there yet: authority, server certificate, the named nodes' keys. What is there stays.

    Returns:
        The files that were made.
    """
    disk.make_folder(folder)
    folder.chmod(0o700)
    before = set(folder.iterdir())
    if not (folder / CA).exists():
        make_authority(folder)
    if not (folder / SERVER).exists():
        make_server_certificate(folder, hosts)
    for name in nodes:
        if not (folder / name).exists():
            make_node_key(folder, name)
    return sorted(set(folder.iterdir()) - before)


def make_authority(folder: Path, days: float = 3650) -> None:
    """Write ca.crt and ca.key. Whoever has the latter can pose as the server: keep it off the machines."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name("ubsmoe federation")
    builder = _certificate(name, name, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    _write(folder, CA, CA_KEY, builder, key, key)


def make_server_certificate(folder: Path, hosts: Sequence[str], days: float = 365) -> None:
    """Write server.pem and server.key, signed by the authority in the same folder.

    Args:
        folder: holds ca.crt and ca.key.
        hosts: the names and addresses by which nodes reach the server.
        days: how long it is valid; negative is expired already.
    """
    authority = x509.load_pem_x509_certificate((folder / CA).read_bytes())
    signer = form.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _certificate(_name(hosts[0]), authority.subject, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(issuer, critical=False)
    _write(folder, SERVER, SERVER_KEY, builder, key, signer)


def make_node_key(folder: Path, name: str) -> Path:
    """Write a node's key pair, NAME and NAME.pub, in OpenSSH's format.

    Returns:
        The public half, to be registered at the server; the private one belongs on the node alone.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())
    public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
    disk.write_new_file(folder / name, private, mode=0o600)
    disk.write_new_file(folder / f"{name}.pub", public + b"\n")
    return folder / f"{name}.pub"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    begin = end - datetime.timedelta(days=abs(days) + 1)  # a day early: the clocks of machines differ
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(begin).not_valid_after(end)


def _write(
    folder: Path,
    name: str,
    key_name: str,
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> None:
    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    disk.write_new_file(folder / key_name, private, mode=0o600)
    signed = builder.sign(signer, hashes.SHA384())
    disk.write_new_file(folder / name, signed.public_bytes(form.Encoding.PEM))
