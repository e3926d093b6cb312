"""Two peers show each other that they know the same token, without sending it.

Each sends 32 random bytes, and then HMAC-SHA256 of both under the token and the words of its role, so that no proof can be played
back or mirrored. It guards the door only: what follows is neither secret nor signed unless the connection is TLS.
"""

from __future__ import annotations

import hmac
import secrets

from hanse.core.errors import CodecError, ConfigError, TransportError
from hanse.transport.frames import LONGEST_GREETING, Name, Said, control
from hanse.transport.tcp import Channel

SHORTEST_TOKEN = 16
_NONCE = 32
_DIALER, _LISTENER = b"hanse dialer", b"hanse listener"


def token_bytes(token: str | bytes) -> bytes:
    """The token as bytes; raises ``ConfigError`` where it is too short to be a secret."""
    secret = token.encode() if isinstance(token, str) else token
    if len(secret) < SHORTEST_TOKEN:
        raise ConfigError(f"token: {len(secret)} bytes; a secret has at least {SHORTEST_TOKEN}")
    return secret


def _proof(token: bytes, role: bytes, listener: bytes, dialer: bytes) -> bytes:
    return hmac.digest(token, role + listener + dialer, "sha256")


def _read(message: Said, say: str, field: str) -> bytes:
    """The 32 bytes in ``field`` of a message that says ``say``."""
    if message.say == "refused":
        raise message.refusal()
    if message.say != say:
        raise CodecError(f"{say!r} must come now, not {message.say!r:.40}")
    try:
        value = bytes.fromhex(message.get(field, str))
    except ValueError:
        raise CodecError(f"{say}: {field} is not hexadecimal") from None
    if len(value) != _NONCE:
        raise CodecError(f"{say}: {field} has {len(value)} bytes; {_NONCE} are expected")
    return value


def admit(channel: Channel, job: int, token: bytes) -> None:
    """The listener's part. Raises ``TransportError`` or ``CodecError``, having told the peer why, where it may not come in."""
    name, mine = Name(job, 0, 0), secrets.token_bytes(_NONCE)
    channel.send(control(name, "hello", nonce=mine.hex()))
    message = channel.control(longest=LONGEST_GREETING)
    theirs, proof = _read(message, "login", "nonce"), _read(message, "login", "proof")
    reason = None
    if not hmac.compare_digest(proof, _proof(token, _DIALER, mine, theirs)):
        reason = "wrong token"
    elif message.name.job != job:
        reason = f"job {message.name.job} is not that of this listener"
    if reason:
        channel.send(control(name, "refused", reason=reason))
        raise TransportError(reason)
    channel.send(control(name, "welcome", proof=_proof(token, _LISTENER, mine, theirs).hex()))


def enter(channel: Channel, job: int, token: bytes) -> None:
    """The dialer's part. Raises ``TransportError`` where either does not trust the other."""
    mine = secrets.token_bytes(_NONCE)
    theirs = _read(channel.control(longest=LONGEST_GREETING), "hello", "nonce")
    proof = _proof(token, _DIALER, theirs, mine).hex()
    channel.send(control(Name(job, 0, 0), "login", nonce=mine.hex(), proof=proof))
    proven = _read(channel.control(longest=LONGEST_GREETING), "welcome", "proof")
    if not hmac.compare_digest(proven, _proof(token, _LISTENER, theirs, mine)):
        raise TransportError("the listener does not know the token")
