"""A federation whose letters really travel comes to the same bits over every way that ``hanse.transport`` has."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import loopback

import hanse as hs
from hanse.core.errors import TransportError
from hanse.engines.deployment import Returned
from hanse.engines.letters import array
from hanse.engines.participant import Participant
from hanse.transport.peers import Link, Listener
from hanse.transport.sources import message

TOKEN = "a token of the tests, long enough"
BACK = 1000
"""What is added to a client's number in the name of its replies."""


class Linked:
    """A ``Post`` over links: every client asks for its next letter and sends its reply."""

    def __init__(self, clients: list[Participant], how: dict[str, Any]) -> None:
        self.listener = Listener(job=1, token=TOKEN, **{n: v for n, v in how.items() if n != "digest"})
        self.count, self.letters, self.over = [0] * len(clients), dict[int, int](), False
        for client in clients:
            threading.Thread(target=self._serve, args=(client, how), daemon=True).start()

    def _serve(self, client: Participant, how: dict[str, Any]) -> None:
        with Link(self.listener.address, job=1, token=TOKEN, **how) as link:
            number = 0
            while not self.over:
                try:
                    tensors, about = link.get(round=number, number=client.client).tensors()
                except TransportError:  # nothing for it yet
                    time.sleep(0.005)
                    continue
                reply = client.work(tensors["letter"].numpy().tobytes(), json.loads(about["about"]))
                link.put(message({"letter": array(reply)}), round=number, number=BACK + client.client)
                number += 1

    def send(self, letter: int, client: int, data: bytes, about: Mapping[str, Any]) -> None:
        self.letters[client] = letter
        source = message({"letter": array(data)}, {"about": json.dumps(about)})
        self.listener.offer(source, round=self.count[client], number=client)
        self.count[client] += 1

    def collect(self, seconds: float) -> list[Returned]:
        try:
            arrived = self.listener.get(timeout=max(seconds, 0.01))
        except TransportError:
            return []
        client = arrived.name.number - BACK
        return [Returned(self.letters[client], client, arrived.tensors()[0]["letter"].numpy().tobytes())]

    def reached(self) -> set[int]:
        return {*range(len(self.count))}


WAYS: dict[str, dict[str, Any]] = {
    "TCP, in one piece": {"ways": ("inline",), "chunk": 1 << 28, "window": 1},
    "TCP, in chunks": {"ways": ("inline",), "chunk": 1000, "window": 8},
    "shared memory": {"ways": ("shared", "inline"), "chunk": 1 << 14, "window": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_three_rounds_come_to_the_same_bits(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    federation = hs.Federation(hs.tasks.digits(hidden=8), clients=4, partition=hs.dirichlet(0.5))
    how: dict[str, Any] = {"path": "stacked", "chunk": 1, "workers": 1, "threads": 1, "shortcuts": False}
    rule, schedule = hs.methods.FedAvg(), hs.schedules.synchronous(cohort=4)
    expected = hs.run(federation, rule, schedule, rounds=3, engine=hs.engines.local(**how))
    posts: list[Linked] = []

    def linked(clients: list[Participant], order: int, deed: Any) -> Linked:
        posts.append(Linked(clients, WAYS[way]))
        return posts[-1]

    monkeypatch.setattr("loopback.Letters", linked)
    found = hs.run(federation, rule, schedule, rounds=3, engine=loopback(**how, folder=str(tmp_path)))
    posts[-1].over = True
    posts[-1].listener.close()
    assert [name for name, t in expected.weights.items() if not torch.equal(t, found.weights[name])] == []
