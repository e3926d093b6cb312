"""Who is taken in and what is refused over Flower's Grid: here a list in this process, with real messages and clients."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hanse.config import Settings
from hanse.core.errors import HanseError, TransportError
from hanse.deploy.share import run_name
from hanse.engines.deployment import Returned
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


def gathered(
    nodes: dict[int, Node], names: list[str], seconds: float = 0.3, known: list[int] | None = None
) -> tuple[GridPost, list[int]]:
    post = GridPost(Grid(nodes), names, None if known is None else torch.tensor(known))
    return post, post.gather(SETTINGS.federation(0), RUN, seconds, grace=0.1).tolist()


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


def answering(post: GridPost, *replies: Callable[[], Any]) -> list[Returned]:
    """What is made of replies, of which the n-th is to letter n of client 1."""
    post.open = {str(number): (number, 1) for number in range(len(replies))}
    post.grid.pull_messages = lambda numbers: [replies[int(number)]() for number in numbers]
    return post.collect(0.0)


def holding(content: Any) -> Any:
    return SimpleNamespace(content=content, has_error=lambda: False, error=None)


def bomb(size: int) -> Any:
    """What Flower makes of a message of a few MB that says it is so many bytes: one piece of it, again and again."""
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    piece = 5 << 20
    array = Array(dtype="uint8", shape=(size,), stype="hanse", data=bytes(2 * piece))
    contents = {name: thing.deflate() for name, thing in get_all_nested_objects(array).items()}
    told = b'"arraychunk_ids": [' + b", ".join([b"0"] * (size // piece)) + b"]"
    whole = contents[array.object_id].replace(b'"arraychunk_ids": [0, 0]', told)
    head, body = whole.split(b"\x00", 1)
    kind, children, _ = head.split(b" ")
    return inflate_object_from_contents(
        "bomb", {**contents, "bomb": b" ".join([kind, children, str(len(body)).encode()]) + b"\x00" + body}
    )


def test_what_cannot_be_read_is_no_reply_and_takes_none_along() -> None:
    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", client(1))}, ["ada", "bob"], 5.0)
    from flwr.app import RecordDict

    def broken() -> Any:
        raise ValueError("Object ID mismatch")

    def good() -> Any:
        return holding(packed(b"fine", {}))

    found = answering(
        post, good, lambda: holding(RecordDict()), lambda: holding(packed(b"", {"error": "the disk is full"})), broken, good
    )
    assert [reply.letter for reply in found] == [0, 1, 2, 3, 4] and {reply.client for reply in found} == {1}
    assert [reply.data for reply in found] == [b"fine", None, None, None, b"fine"]
    assert [reply.why.split(":")[0] for reply in found[1:4]] == ["not a message of hanse", "the disk is full", "not a message"]
    assert not post.open


@pytest.mark.parametrize("size", [2_000_000, 10 << 30])
def test_a_reply_that_is_too_large_takes_no_memory(size: int) -> None:
    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", client(1))}, ["ada", "bob"], 5.0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    make = (lambda: holding(packed(bytes(size), {}))) if size < 1 << 30 else (lambda: holding(bomb(size)))
    post.largest = 600_000
    (reply,) = answering(post, make)
    assert reply.data is None and reply.why == "its reply is larger than any that can be right, 1.6 MB"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_run_that_goes_on_does_so_without_those_who_are_gone(caplog: pytest.LogCaptureFixture) -> None:
    was = SETTINGS.federation(0).split.train.counts().tolist()
    post, counts = gathered({71: ("ada", client(0))}, ["ada", "bob"], 5.0, known=was)
    assert counts == was and post.reached() == {0}
    assert "these clients are missing, and the run goes on: bob" in caplog.text
    post.send(4, 1, b"", {"version": 0})
    (reply,) = post.collect(0.0)
    assert (reply.letter, reply.client, reply.data, reply.why) == (4, 1, None, "it is not there")
    post.grid.nodes[72] = ("bob", client(1))
    assert post.reached() == {0, 1}
    assert post.nodes == {0: 71, 1: 72}


def test_who_comes_later_with_other_samples_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    was = SETTINGS.federation(0).split.train.counts().tolist()
    post, _ = gathered({71: ("ada", client(0))}, ["ada", "bob"], 5.0, known=[was[0], 5])
    post.grid.nodes[72] = ("bob", client(1))
    assert [len(post.reached()) for _ in range(3)] == [1, 1, 1]
    assert f"samples are {was[1]} there, and were 5 when the run was started" in caplog.text


def test_a_node_that_is_gone_gets_no_letter() -> None:
    post, _ = gathered({71: ("ada", client(0)), 72: ("bob", client(1))}, ["ada", "bob"], 5.0)
    del post.grid.nodes[72]
    assert post.reached() == {0}
    post.send(9, 1, b"", {"version": 0})
    (reply,) = post.collect(0.0)
    assert (reply.letter, reply.client, reply.data) == (9, 1, None)
