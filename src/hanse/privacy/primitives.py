"""The cryptography of the protocol: each function is one call of a maintained library. Needs the extra ``privacy``."""

from __future__ import annotations

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hanse.core.errors import PrivacyError
from hanse.privacy.secure import Array

SEED, PUBLIC, NONCE, TAG = 16, 32, 12, 16
"""Bytes of a seed or a share of one, a public key, a nonce, and what authentication adds to a text."""
ZEROS = memoryview(bytes(1 << 20))


def derived(secret: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869): independent keys for different ``info``."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=info).derive(secret)


def private_key(seed: bytes) -> X25519PrivateKey:
    """The X25519 key of a 16-byte seed, which has the strength of the curve and fits the field of ``Shamir``."""
    return X25519PrivateKey.from_private_bytes(derived(seed, b"hanse x25519"))


def public_key(key: X25519PrivateKey) -> bytes:
    """32 bytes."""
    return key.public_key().public_bytes_raw()


def agreed(key: X25519PrivateKey, other: bytes, info: bytes) -> bytes:
    """The 32-byte key that two owners of key pairs share (X25519, then HKDF); raises ``PrivacyError`` on a degenerate key."""
    try:
        return derived(key.exchange(X25519PublicKey.from_public_bytes(other)), info)
    except ValueError:
        raise PrivacyError("secure: a public key is not one") from None


def sealed(key: bytes, text: bytes, context: bytes, nonce: bytes) -> bytes:
    """Nonce and ChaCha20-Poly1305 of ``text``; ``context`` is authenticated, not sent."""
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, context)


def opened(key: bytes, data: bytes, context: bytes) -> bytes:
    """The text of ``sealed``; raises ``PrivacyError`` if anything about it was changed."""
    try:
        return ChaCha20Poly1305(key).decrypt(data[:NONCE], data[NONCE:], context)
    except InvalidTag:
        raise PrivacyError("secure: an encrypted share was changed on its way") from None


def add_mask(total: Array, key: bytes, sign: int) -> None:
    """``total += sign * PRG(key)`` modulo the word, in place: AES-256 in counter mode, as in the paper,; a key is for one mask."""
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    words = len(ZEROS) // total.itemsize
    for start in range(0, len(total), words):  # in pieces that stay in the cache
        part = total[start : start + words]
        mask = np.frombuffer(stream.update(ZEROS[: part.nbytes]), total.dtype)
        (np.add if sign > 0 else np.subtract)(part, mask, out=part)


def split(secret: bytes, least: int, holders: int) -> list[bytes]:
    """A 16-byte share for each holder (Shamir over GF(2^128)), ``least`` of which give back the 16-byte secret."""
    return [share for _, share in Shamir.split(least, holders, secret, False)]


def combined(shares: dict[int, bytes]) -> bytes:
    """The secret, from exactly ``least`` shares by the holder's place, from 0."""
    return bytes(Shamir.combine([(place + 1, share) for place, share in shares.items()], False))
