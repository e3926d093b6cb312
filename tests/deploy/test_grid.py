"""Who is taken in and what is refused over Flower's Grid: here a list in this process, with real messages and clients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hanse.config import Settings
from hanse.core.errors import HanseError, TransportError
from hanse.deploy.share import run_name
from hanse.engines.flower import GridPost, packed, unpacked

pytest.importorskip("flwr")
from hanse.deploy.client import work

SETTINGS = Settings.read(None, {"task": "digits(hidden=4)", "clients": 2, "schedule": "synchronous(cohort=2)", "rounds": 1})
RUN = run_name(SETTINGS)

Node = tuple[str, Callable[[bytes, dict[str, Any]], tuple[bytes, dict[str, Any]]]]
"""A node's registered name, and what it answers."""


def client(number: int, **settings: Any) -> Callable[[bytes, dict[str, Any]], tuple[bytes, dict[str, Any]]]:
    """What hanse's own client app answers as client ``number``."""
    config = {"settings": Settings.read(None, {**SETTINGS.model_dump(), **settings}).toml()}
    return lambda data, about: work(data, about, config, {"client": number, "data": "nowhere"})


class Grid:
    """What ``GridPost`` needs of Flower's."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes, self.sent = nodes, dict[str, Any]()

    def get_nodes(self) -> list[Any]:
        return [SimpleNamespace(node_id=node, name=name) for node, (name, _) in self.nodes.items()]

    def get_node_ids(self) -> list[int]:
        return [*self.nodes]

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        numbers = []
        for message in messages:
            known = message.metadata.dst_node_id in self.nodes
            numbers.append(f"m{len(self.sent)}" if known else "")
            if known:
                self.sent[numbers[-1]] = message
        return numbers

    def pull_messages(self, numbers: Iterable[str]) -> list[Any]:
        return [self._reply(number, self.sent.pop(number)) for number in numbers if number in self.sent]

    def _reply(self, number: str, message: Any) -> Any:
        try:
            content, error = packed(*self.nodes[message.metadata.dst_node_id][1](*unpacked(message.content))), None
        except HanseError as failed:
            content, error = packed(b"", {"error": str(failed)}), None
        except RuntimeError as failed:
            content, error = None, SimpleNamespace(code=2, reason=repr(failed))
        metadata = SimpleNamespace(reply_to_message_id=number)
        return SimpleNamespace(content=content, error=error, has_error=lambda: error is not None, metadata=metadata)


@pytest.fixture(autouse=True)
def in_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made in the task of a run, which Flower has told the process of."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def gathered(nodes: dict[int, Node], names: list[str], seconds: float = 0.3) -> tuple[GridPost, list[int]]:
    post = GridPost(Grid(nodes), names)
    return post, post.gather(SETTINGS.federation(0), RUN, seconds).tolist()


def test_clients_are_taken_in_by_name_and_number() -> None:
    post, counts = gathered({71: ("bob", client(1)), 72: ("ada", client(0))}, ["ada", "bob"], 5.0)
    assert post.nodes == {0: 72, 1: 71}
    assert counts == SETTINGS.federation(0).split.train.counts().tolist()


def raising(data: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    raise RuntimeError("no disk")


BAD: dict[str, tuple[Node, str]] = {
    "another's number": (("bob", client(0)), "it says it is client 0, who is ada"),
    "a number there is none of": (("bob", lambda d, a: (b"", {"client": 7, "samples": 3})), "it says it is client 7"),
    "no number": (("bob", lambda d, a: (b"", {})), "it says it is client None"),
    "less than no samples": (("bob", lambda d, a: (b"", {"client": 1, "samples": -5})), "with -5 samples"),
    "other settings": (("bob", client(1, rounds=9)), f"asked for {RUN}"),
    "another model": (("bob", lambda d, a: (b"", {"client": 1, "samples": 3, "model": 5})), "model is 5 there and"),
    "an error": (("bob", raising), "error 2 there: RuntimeError('no disk')"),
}


@pytest.mark.parametrize("what", BAD)
def test_who_does_not_belong_is_refused_and_named_as_missing(what: str, caplog: pytest.LogCaptureFixture) -> None:
    node, why = BAD[what]
    with pytest.raises(TransportError, match=r"after 0\.3 s these clients are missing: bob"):
        gathered({71: ("ada", client(0)), 72: node}, ["ada", "bob"])
    (line,) = [record.getMessage() for record in caplog.records if "is refused" in record.getMessage()]
    assert line.startswith("node 72 (bob) is refused: ") and why in line


def test_nobody_is_two_clients(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TransportError, match="these clients are missing: 1"):
        gathered({71: ("", client(0)), 72: ("", client(0))}, [])
    assert "it says it is client 0, who is node 71" in caplog.text


def test_a_node_that_was_mended_is_taken_in_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[GridPost.__module__], "AGAIN", 0.2)
    tries = []

    def broken_at_first(data: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        tries.append(about["ask"])
        return client(1)(data, about) if len(tries) > 1 else raising(data, about)

    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", broken_at_first)}, ["ada", "bob"], 5.0)
    assert post.nodes == {0: 71, 1: 72} and tries == ["hello", "hello"]


def test_what_is_no_message_of_hanse_is_no_reply(tmp_path: Path) -> None:
    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", client(1))}, ["ada", "bob"], 5.0)
    from flwr.app import RecordDict

    for content in (RecordDict(), packed(b"", {"error": "the disk is full"})):
        post.open["x"] = (4, 1)
        message = SimpleNamespace(
            content=content, has_error=lambda: False, metadata=SimpleNamespace(reply_to_message_id="x"), error=None
        )
        post.grid.pull_messages = lambda numbers, message=message: [message]
        (reply,) = post.collect(0.0)
        assert (reply.letter, reply.client, reply.data) == (4, 1, None) and reply.why


def test_a_node_that_is_gone_gets_no_letter() -> None:
    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", client(1))}, ["ada", "bob"], 5.0)
    del post.grid.nodes[72]
    assert post.reached() == {0}
    post.send(9, 1, b"", {"version": 0})
    (reply,) = post.collect(0.0)
    assert (reply.letter, reply.client, reply.data) == (9, 1, None)
