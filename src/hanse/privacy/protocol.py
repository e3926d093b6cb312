"""The two parties of secure aggregation: what they compute and exchange, without a network. Needs the extra ``privacy``.

A ``Client`` and a ``Server`` are for one aggregation. Messages are bytes, or bytes by client number; whoever carries them sees to
it that they arrive (the same bytes may be sent again) and that clients know the server. See ``hanse.privacy.secure``.

    ======================  =======================================  ====================================
    step                    client                                   server
    ======================  =======================================  ====================================
    0 advertise keys        ``advertise()``: two public keys         ``pair``: each the keys of its peers
    1 share                 ``share(keys)``: sealed shares           ``route``: to whom they are for
    2 masked input          ``mask(shares, values)``                 ``add`` each, then ``request``
    3 unmask                ``unmask(request)``: shares in the open  ``total``
    ======================  =======================================  ====================================

Anything malformed, out of order or asked for twice raises ``PrivacyError`` and reveals nothing.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from hanse.core.errors import PrivacyError
from hanse.privacy.primitives import (
    NONCE,
    PUBLIC,
    SEED,
    TAG,
    add_mask,
    agreed,
    combined,
    derived,
    opened,
    private_key,
    public_key,
    sealed,
    split,
)
from hanse.privacy.secure import Array, Entropy, secure

Messages = dict[int, bytes]
"""Bytes by client number."""
STAYED, LEFT = b"b", b"s"
"""Which share of a client the server asks for: of the seed b_u, since y_u arrived, or of the key behind s_uv, since it did not."""


class Client:
    """Client ``number`` of ``clients``; steps are called once each, in order."""

    def __init__(self, part: secure, number: int, clients: int, entropy: Entropy = os.urandom) -> None:
        self.number, self.dtype, self._entropy = number, part.dtype, entropy
        self.most = part.circle(clients)
        self.least = part.least(self.most)
        self._channel = private_key(entropy(SEED))
        self._key_seed, self._mask_seed = entropy(SEED), entropy(SEED)  # s^SK and b of the paper
        self._key = private_key(self._key_seed)
        self._peers: Messages = {}
        self._held: Messages = {}
        self._done: str | None = None

    def advertise(self) -> bytes:
        """The public keys for sealing and for masks."""
        self._after(None, "advertise")
        return public_key(self._channel) + public_key(self._key)

    def share(self, keys: Messages) -> Messages:
        """Shares of this client's two secrets, sealed for each peer, from the peers' public keys."""
        holders = sorted([*keys, self.number])
        checked("keys", keys, 2 * PUBLIC)
        if self.number in keys or not self.least <= len(holders) <= self.most:
            raise PrivacyError(f"secure: keys of {len(keys)} peers, allowed are {self.least - 1} to {self.most - 1} others")
        secrets = [split(secret, self.least, len(holders)) for secret in (self._key_seed, self._mask_seed)]
        shares = {holder: a + b for holder, a, b in zip(holders, *secrets, strict=True)}
        held = shares.pop(self.number)
        channels = {v: agreed(self._channel, keys[v][:PUBLIC], sealing(self.number, v)) for v in keys}
        sent = {v: sealed(channels[v], shares[v], sealing(self.number, v), self._entropy(NONCE)) for v in keys}
        self._after("advertise", "share")
        self._peers, self._held = dict(keys), {self.number: held}
        return sent

    def mask(self, shares: Messages, values: Array) -> bytes:
        """A check value of b_u and y_u, from the peers' sealed shares; ``values`` are integers ``[length]`` of the part's dtype."""
        checked("shares", shares, NONCE + 2 * SEED + TAG)
        if not shares.keys() <= self._peers.keys() or len(shares) + 1 < self.least:
            raise PrivacyError(f"secure: shares of {len(shares)} clients, needed are those of {self.least - 1} peers")
        if values.ndim != 1 or values.dtype != self.dtype:
            raise PrivacyError(f"secure: values are {values.dtype} {values.shape}, expected is a vector of {self.dtype}")
        held = {}
        for v, data in shares.items():
            key = agreed(self._channel, self._peers[v][:PUBLIC], sealing(v, self.number))
            held[v] = opened(key, data, sealing(v, self.number))
        masked = values.copy()
        add_mask(masked, own_mask(self._mask_seed), 1)
        for v in shares:
            add_mask(masked, agreed(self._key, self._peers[v][PUBLIC:], masking(self.number, v)), 1 if v > self.number else -1)
        self._after("share", "mask")
        self._held |= held
        return check_value(self._mask_seed) + masked.tobytes()

    def unmask(self, request: Messages) -> Messages:
        """This client's share of one secret of each peer and of itself, as asked for; only once, so never of both."""
        checked("request", request, 1)
        stayed = [u for u, kind in request.items() if kind == STAYED]
        if request.keys() != self._held.keys() or not set(request.values()) <= {STAYED, LEFT}:
            raise PrivacyError("secure: the request must name one share of every client whose shares are held here")
        if self.number not in stayed or len(stayed) < self.least:
            raise PrivacyError(f"secure: the request names {len(stayed)} who stayed; needed are {self.least} and this client")
        self._after("mask", "unmask")
        return {u: held[SEED:] if request[u] == STAYED else held[:SEED] for u, held in self._held.items()}

    def _after(self, before: str | None, now: str) -> None:
        if self._done != before:
            raise PrivacyError(f"secure: {now} comes once, after {before or 'nothing'}; the last step was {self._done}")
        self._done = now


class Server:
    """The server for ``clients`` clients with vectors of ``length`` integers; steps are called once each, in order.

    ``included``, from step 2 on, are the clients in the sum.
    """

    def __init__(self, part: secure, clients: int, length: int, entropy: Entropy = os.urandom) -> None:
        self.neighbours, self.dtype, self.length, self._entropy = part.neighbours, part.dtype, length, entropy
        self.all_least = part.least(clients)
        self.least = part.least(part.circle(clients))
        self.included: dict[int, bytes] = {}
        self._keys: Messages = {}
        self._around: dict[int, list[int]] = {}
        self._sharing: set[int] = set()
        self._asked: dict[int, Messages] = {}
        self._sum: Array = np.zeros(length, self.dtype)

    def pair(self, advertised: Messages) -> dict[int, Messages]:
        """For each client the public keys of its peers: of all others, or of its neighbours on a random ring."""
        checked("public keys", advertised, 2 * PUBLIC)
        self._enough(advertised, self.all_least, "advertised keys")
        ring = sorted(advertised, key=lambda _: self._entropy(SEED))
        reach = min(len(ring), len(ring) if self.neighbours is None else self.neighbours) // 2
        self._keys = dict(advertised)
        self._around = {
            u: sorted({ring[(place + step) % len(ring)] for step in range(-reach, reach + 1)}) for place, u in enumerate(ring)
        }
        return {u: {v: advertised[v] for v in around if v != u} for u, around in self._around.items()}

    def route(self, sent: Mapping[int, Messages]) -> dict[int, Messages]:
        """For each client that shared, its peers' sealed shares."""
        for u, sealed_shares in sent.items():
            checked(f"shares of client {u}", sealed_shares, NONCE + 2 * SEED + TAG)
            if sealed_shares.keys() != set(self._around.get(u, ())) - {u}:
                raise PrivacyError(f"secure: client {u} shared with others than its peers")
        self._each_enough(sent, "shared")
        self._sharing = set(sent)
        return {v: {u: sent[u][v] for u in self._around[v] if u in sent and u != v} for v in sent}

    def add(self, client: int, masked: bytes) -> None:
        """Take a client's masked vector into the sum."""
        checked("masked values", {client: masked}, SEED + self.length * self.dtype.itemsize)
        if client not in self._sharing or client in self.included or self._asked:
            raise PrivacyError(f"secure: masked values of client {client} were not expected, or came twice or too late")
        self._sum += np.frombuffer(masked, self.dtype, offset=SEED)
        self.included[client] = masked[:SEED]

    def request(self) -> dict[int, Messages]:
        """For each client in the sum, of whom to give which share; raises ``PrivacyError`` if too few are left."""
        self._each_enough(self.included, "sent masked values")
        kinds = {u: STAYED if u in self.included else LEFT for u in self._sharing}
        self._asked = {v: {u: kinds[u] for u in self._around[v] if u in kinds} for v in self.included}
        return self._asked

    def total(self, answers: Mapping[int, Messages]) -> Array:
        """The sum over ``included``; raises ``PrivacyError`` if too few answered or shares do not fit together."""
        for v, shares in answers.items():
            checked(f"answer of client {v}", shares, SEED)
            if v not in self._asked or shares.keys() != self._asked[v].keys():
                raise PrivacyError(f"secure: client {v} answered what it was not asked")
        given = {u: {i: answers[v][u] for i, v in enumerate(self._around[u]) if v in answers} for u in self._sharing}
        for u, shares in given.items():
            self._enough(shares, self.least, f"answered about client {u}")
        total = self._sum.copy()
        for u, shares in given.items():
            secret = combined(dict(list(shares.items())[: self.least]))
            if u in self.included:
                known, found = self.included[u], check_value(secret)
            else:
                known, found = self._keys[u][PUBLIC:], public_key(private_key(secret))
            if found != known:
                raise PrivacyError(f"secure: the shares of client {u} do not fit together: one was changed")
            if u in self.included:
                add_mask(total, own_mask(secret), -1)
                continue
            for v in self._around[u]:
                if v in self.included:
                    add_mask(total, agreed(private_key(secret), self._keys[v][PUBLIC:], masking(u, v)), -1 if u > v else 1)
        return total

    def _each_enough(self, stayed: Collection[int], what: str) -> None:
        self._enough(stayed, self.all_least, what)
        for u in stayed:
            self._enough([v for v in self._around[u] if v in stayed], self.least, f"{what} around client {u}")

    @staticmethod
    def _enough(stayed: Collection[int], least: int, what: str) -> None:
        if len(stayed) < least:
            raise PrivacyError(f"secure.threshold: only {len(stayed)} clients {what}, needed are {least}; nothing was revealed")


def aggregate(
    part: secure,
    values: Mapping[int, Array],
    gone: Sequence[Collection[int]] = ((), (), (), ()),
    entropy: Entropy = os.urandom,
) -> tuple[Array, set[int]]:
    """The whole protocol in one process: the sum and who is in it, from integers ``[length]`` by client number.

    ``gone[k]`` are those who do not answer step k, nor any later one. Raises ``PrivacyError`` as the parties do.
    """
    part.require("cryptography", "Crypto")
    left = [set().union(*gone[: k + 1]) for k in range(4)]
    clients = {u: part.client(u, len(values), entropy) for u in sorted(values)}
    server = part.server(len(values), len(next(iter(values.values()))), entropy)
    keys = server.pair({u: client.advertise() for u, client in clients.items() if u not in left[0]})
    shares = server.route({u: clients[u].share(keys[u]) for u in keys if u not in left[1]})
    for u in shares.keys() - left[2]:
        server.add(u, clients[u].mask(shares[u], values[u]))
    request = server.request()
    total = server.total({u: clients[u].unmask(request[u]) for u in request if u not in left[3]})
    return total, set(server.included)


def sealing(sender: int, receiver: int) -> bytes:
    """What a sealed share is bound to."""
    return f"hanse share {sender} to {receiver}".encode()


def masking(u: int, v: int) -> bytes:
    """What the mask of two clients is bound to."""
    return f"hanse mask {min(u, v)} and {max(u, v)}".encode()


def own_mask(seed: bytes) -> bytes:
    """The generator's key of a client's own mask."""
    return derived(seed, b"hanse own mask")


def check_value(seed: bytes) -> bytes:
    """By which the server sees that it has put b_u together rightly: our addition. HKDF keeps it independent of the mask."""
    return derived(seed, b"hanse check", SEED)


def checked(what: str, messages: Mapping[int, bytes], size: int) -> None:
    """Raise ``PrivacyError`` unless each message is that many bytes from a client's number."""
    for number, data in messages.items():
        if not isinstance(number, int) or not isinstance(data, bytes) or len(data) != size:
            raise PrivacyError(f"secure: {what}: client {number!r} sent something else than {size} bytes")
