"""Real clients without a network between them and the server: letters wait in a list until somebody looks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

import hanse as hs
from hanse.core.errors import HanseError
from hanse.engines import Engine
from hanse.engines.deployment import Deployment, Returned
from hanse.engines.participant import Participant
from hanse.engines.rounds import Rounds

Deed = Callable[["Letters", Returned], list[Returned]]
"""What becomes of a reply on its way."""


class Letters:
    """A ``Post``: clients work when the server waits, in an order of their own."""

    def __init__(self, clients: list[Participant], seed: int = 0, deed: Deed = lambda post, reply: [reply]) -> None:
        self.clients, self.deed, self.random = clients, deed, random.Random(seed)
        self.waiting: list[tuple[int, int, bytes, dict[str, Any]]] = []
        self.sent: list[tuple[int, int]] = []
        self.received: list[tuple[int, int]] = []
        self.away: set[int] = set()

    def send(self, letter: int, client: int, data: bytes, about: Mapping[str, Any]) -> None:
        self.waiting.append((letter, client, data, json.loads(json.dumps(about))))
        self.sent.append((client, len(data)))

    def collect(self, seconds: float) -> list[Returned]:
        there = [i for i, letter in enumerate(self.waiting) if letter[1] not in self.away]
        if not there:
            return []
        letter, client, data, about = self.waiting.pop(self.random.choice(there))
        try:
            reply = Returned(letter, client, self.clients[client].work(data, about))
        except HanseError as error:
            reply = Returned(letter, client, None, str(error))
        self.received.append((client, len(reply.data or b"")))
        return self.deed(self, reply)

    def reached(self) -> set[int]:
        return {*range(len(self.clients))} - self.away


class loopback(Engine):
    """Real clients in this process, whose states lie in a folder."""

    folder: str
    """Where they keep what they keep."""
    order: int = 0
    """Decides in which order they reply."""

    def network(self, federation: hs.Federation, method: Any, codec: Any, down: Any, **run: Any) -> Rounds:
        for simulated in ("privacy", "attack", "schedule"):
            run.pop(simulated)
        name = f"{type(method).__name__}-{run['seed']}"
        own = {"seed": run["seed"], "run": name}
        folders = [Path(self.folder) / str(i) for i in range(federation.clients)]
        clients = [
            Participant(federation, method, codec, down, self, client=i, folder=folder, **own) for i, folder in enumerate(folders)
        ]
        counts = torch.tensor([client.hello()["samples"] for client in clients])
        self.made.append(Letters(clients, self.order, self.deeds[-1]))
        return Deployment(federation, method, self, codec, down, self.made[-1], counts, run=name, grace=0.2, **run)

    made: ClassVar[list[Letters]] = []
    """The posts of all networks so far."""
    deeds: ClassVar[list[Deed]] = [lambda post, reply: [reply]]
    """The last of them is what becomes of replies."""
