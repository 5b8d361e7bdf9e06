"""Keys of one client in one round: X25519 pairs, what two clients derive from them, and boxes that only the receiver opens.

    pair mask key   HKDF(X25519(own mask key, theirs), "mask")      the same on both sides
    box key         HKDF(X25519(own box key, theirs), "box")        AES-256-GCM, bound to session, sender and receiver

Every key is drawn anew in every round from the system's generator, never from the run's seed, which the server knows.
"""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12


def new_secret() -> bytes:
    """32 random bytes: a private key of X25519, or the seed of a mask."""
    return secrets.token_bytes(KEY_BYTES)


def public_of(private: bytes) -> bytes:
    """The public half of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str, session: str) -> bytes:
    """The key that two clients share for a purpose in a session. Raises ValueError for a public key that is none."""
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"ubsmoe secagg {purpose} {session}".encode()).derive(secret)


def lock(key: bytes, content: bytes, route: str) -> bytes:
    """A box with this content; it opens only for the same key and route."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, route.encode())


def unlock(key: bytes, box: bytes, route: str) -> bytes:
    """The content of a box. Raises ValueError if it was made with another key or for another route, or was changed."""
    try:
        return AESGCM(key).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], route.encode())
    except (InvalidTag, ValueError):
        raise ValueError("the box does not open") from None
