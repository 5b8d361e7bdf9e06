"""Signatures of offers: a machine signs with the key that it is registered with, and checks the others' by their public halves.

The public halves lie in a folder on every machine, NAME.pub in OpenSSH's format, brought there by whoever runs the machines and
not by the server. The key NAME.pub speaks for client NAME and nobody else does; a client without a file of its own name is one of
several on a machine, and any key of the folder may speak for it.
"""

import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from ubsmoe.errors import UserError
from ubsmoe.secagg.member import Check, Refusal, Sign
from ubsmoe.secagg.messages import Offer

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # never a path


def sign_with(place: Path) -> Sign:
    """Signs as the private key in this file, under the file's name. Raises UserError if there is none."""
    try:
        key = load_ssh_private_key(place.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise UserError(f"signing-key: {place} holds no private key of `ubsmoe flower keys` ({error})") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise UserError(f"signing-key: {place} is no elliptic-curve key, as `ubsmoe flower keys` makes them")
    signer = key

    def sign(offer: Offer) -> Offer:
        named = offer.model_copy(update={"signer": place.name})
        return named.model_copy(update={"signature": signer.sign(named.content(), ECDSA(SHA384())).hex()})

    return sign


def check_with(folder: Path) -> Check:
    """Checks offers against the public keys of a folder. Raises UserError if it is none."""
    if not folder.is_dir():
        raise UserError(f"peer-keys: {folder} is no folder; it holds NAME.pub of every machine that may take part")

    def check(offer: Offer) -> None:
        own = folder / f"{offer.client}.pub"
        wanted = offer.client if NAME.fullmatch(offer.client) and own.exists() else offer.signer
        if not offer.signature or offer.signer != wanted or not NAME.fullmatch(wanted):
            raise Refusal(f"the keys of {offer.client} are not signed by {wanted or 'anybody'}")
        try:
            key = load_ssh_public_key((folder / f"{wanted}.pub").read_bytes())
            assert isinstance(key, EllipticCurvePublicKey)
            key.verify(bytes.fromhex(offer.signature), offer.content(), ECDSA(SHA384()))
        except (OSError, ValueError, AssertionError, InvalidSignature):
            raise Refusal(f"the keys of {offer.client} are not signed by the key {wanted}.pub in {folder}") from None

    return check
