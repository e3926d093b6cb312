"""Real clients behind Flower's deployment engine: letters as Flower messages, over its Grid.

This module talks to the Grid that it is given and imports nothing of Flower but the types of messages, when it is used. The other
half, the apps that Flower starts, is ``hanse.deploy``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import PositiveFloat, model_validator

from hanse.core.errors import ConfigError, MissingExtraError, TransportError
from hanse.core.messages import Tensors
from hanse.core.wire import pieces
from hanse.engines.base import Engine
from hanse.engines.deployment import Deployment, Returned
from hanse.engines.rounds import Rounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from hanse.codecs.base import Codec
    from hanse.federation import Federation
    from hanse.methods.base import Method

log = logging.getLogger(__name__)

LETTER, ABOUT = "letter", "about"
"""Names of the records of a message: the bytes, and what is said beside them, as JSON."""
SLOW = 0.1
"""Seconds between looks for replies; Flower does not wait for them."""
MANY = 1 << 40
"""Samples that no client has."""
SMALL = 1 << 20
"""Bytes beyond those of its arrays that a reply may have."""
SPREAD, ROOM = 6, 256 << 20
"""Flower has a message this many times in memory while it puts it together; and the bytes that its threads take beside it."""
STATM = Path("/proc/self/statm")
UNREADABLE = (MemoryError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
"""What Flower raises for messages that are none: it trusts those who send them."""
AGAIN = 30.0
"""Seconds after which a node that was refused at the start is asked again."""


class flower(Engine):
    """Real clients, each a Flower SuperNode: 'hanse deploy' writes the app that is run there."""

    grace: PositiveFloat = 60.0
    """Seconds for which a client may be out of reach before the round goes on without it."""
    gather: PositiveFloat = 600.0
    """Seconds to wait for all clients to be there at the start; one that goes on is content with some after ``grace`` seconds."""

    @model_validator(mode="after")
    def _real(self) -> flower:
        for name in ("chunk", "workers", "kept", "shortcuts"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"flower.{name}: {getattr(self, name)} is not allowed: it is about simulated clients")
        return self

    def network(self, federation: Federation, method: Method, codec: Codec, down: Codec, **run: Any) -> Rounds:
        link = LINK.get(None)
        if link is None:
            raise ConfigError("engine: flower is not run by 'hanse run': write an app for it with 'hanse deploy FILE.toml'")
        for simulated in ("privacy", "attack"):
            if run.pop(simulated):
                raise ConfigError(f"{simulated}: not allowed with engine flower: it is simulated")
        run.pop("schedule")
        counts = link.post.gather(federation, link.run, self.gather, self.grace)
        run["names"] = link.post.called
        return Deployment(federation, method, self, codec, down, link.post, counts, run=link.run, grace=self.grace, **run)


class Link(NamedTuple):
    """What a run in Flower's ServerApp has: the way to its clients, and its name."""

    post: GridPost
    run: str


LINK: ContextVar[Link] = ContextVar("link")


@contextmanager
def linked(post: GridPost, run: str) -> Iterator[None]:
    """Have ``flower`` networks made in here use ``post``."""
    token = LINK.set(Link(post, run))
    try:
        yield
    finally:
        LINK.reset(token)


def records() -> Any:
    """Flower's types of messages; raises ``MissingExtraError`` without it."""
    try:
        import flwr.app
    except ImportError:
        raise MissingExtraError("engine flower", "flower") from None
    return flwr.app


def packed(data: bytes, about: Mapping[str, Any]) -> Any:
    """The content of a Flower message."""
    app = records()
    array = app.Array(dtype="uint8", shape=(len(data),), stype="hanse", data=data)  # as a ConfigRecord it would be deflated
    return app.RecordDict({LETTER: app.ArrayRecord({LETTER: array}), ABOUT: app.ConfigRecord({ABOUT: json.dumps(about)})})


def unpacked(content: Any) -> tuple[bytes, dict[str, Any]]:
    """The bytes of a Flower message and what is said beside them; raises ``TransportError`` where it holds something else."""
    try:
        about = json.loads(content[ABOUT][ABOUT])
        data = content[LETTER][LETTER].data
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TransportError(f"not a message of hanse: {error!r}") from None
    if not isinstance(about, dict) or not isinstance(data, bytes):
        raise TransportError("not a message of hanse")
    return data, about


class Answer(NamedTuple):
    """What came back of a message: the bytes and what is said beside them, or why there are none."""

    data: bytes | None
    about: dict[str, Any]
    why: str = ""


class GridPost:
    """A ``Post`` over Flower's Grid. ``names`` are the clients', by their numbers, as their keys were registered; without names,
    whoever first says it is a client is that client for the run. ``known`` are the numbers of samples that clients had when the run
    was stopped, int64 ``[N]``: with them it goes on although some are not there.
    """

    def __init__(self, grid: Any, names: list[str], known: Tensor | None = None) -> None:
        self.grid, self.names, self.known = grid, names, known
        self.largest = 0
        self.nodes: dict[int, int] = {}
        """Flower's numbers of the nodes, by client."""
        self.called: list[str] = []
        """What clients are called: as their keys were registered, else by their numbers."""
        self.counts: dict[int, int] = {}
        """Numbers of samples, by client."""
        self.open: dict[str, tuple[int, int]] = {}
        """Letters and clients, by the message that replies are asked for by."""
        self.unsent: list[Returned] = []
        self.envelope = 0
        """Bytes sent and received beside letters."""
        self._asked: dict[str, int] = {}
        self._due: dict[int, float] = {}
        """Nodes by the message that asked them who they are, and when others are to be asked."""

    def _push(self, node: int, data: bytes, about: Mapping[str, Any]) -> str:
        content = packed(data, about)
        message = records().Message(content, dst_node_id=node, message_type="train", group_id=str(about.get("version", "")))
        (number,) = self.grid.push_messages([message])
        self.envelope += len(json.dumps(about))
        return str(number or "")

    def send(self, letter: int, client: int, data: bytes, about: Mapping[str, Any]) -> None:
        """See ``Post``."""
        number, why = "", "it is not there"
        if client in self.nodes:
            try:
                number = self._push(self.nodes[client], data, {**about, "letter": letter, "client": client, "ask": "work"})
                why = "the server's link does not know it any more"
            except (ValueError, RuntimeError, OSError) as error:
                why = f"what it was sent did not get to the server's link: {error}"
        if number:
            self.open[number] = (letter, client)
        else:
            self.unsent.append(Returned(letter, client, None, why))

    def collect(self, seconds: float) -> list[Returned]:
        """See ``Post``."""
        end = time.monotonic() + seconds
        while True:
            found, self.unsent = self.unsent, []
            for number in [*self.open]:
                answer = self._pull(number)
                if answer is not None:
                    found.append(Returned(*self.open.pop(number), answer.data, answer.why))
            if found or time.monotonic() >= end:
                return found
            time.sleep(min(SLOW, max(0.0, end - time.monotonic())))

    def _pull(self, number: str) -> Answer | None:
        """The reply to a message, if there is one by now; asked for alone, because one that cannot be read takes others along."""
        from google.protobuf.message import DecodeError

        most = self.largest + SMALL
        try:
            with grows_by(SPREAD * most + ROOM):
                message = next(iter(self.grid.pull_messages([number])), None)
        except (*UNREADABLE, DecodeError) as error:
            return Answer(None, {}, too_large(most) if isinstance(error, MemoryError) else f"not a message: {error!r}")
        if message is None:
            return None
        if message.has_error():
            return Answer(None, {}, f"error {message.error.code} there: {message.error.reason}")
        try:
            data, about = unpacked(message.content)
        except TransportError as error:
            return Answer(None, {}, str(error))
        self.envelope += len(json.dumps(about))
        if "error" in about:
            return Answer(None, about, str(about["error"]))
        return Answer(data, about) if len(data) <= most else Answer(None, about, too_large(most))

    # ---- who is there

    def reached(self) -> set[int]:
        """See ``Post``."""
        there = self._admit()
        return {client for client, node in self.nodes.items() if node in there}

    def gather(self, federation: Federation, run: str, seconds: float, grace: float) -> Tensor:
        """Wait until all clients of ``federation`` have said who they are; their numbers of samples, int64 ``[N]``.

        A run that goes on does so after ``grace`` seconds with those who are there. Who has another task, another model,
        or says it is somebody else, is refused, and asked again after a while, because a node can be mended. Raises
        ``TransportError`` when time is up.
        """
        self.about_task, self.population, self.run = about_task(federation), federation.clients, run
        self.called = self.names or [str(client) for client in range(federation.clients)]
        began = time.monotonic()
        while True:
            self._admit()
            missing = [client for client in range(federation.clients) if client not in self.nodes]
            names, waited = ", ".join(self.called[client] for client in missing), time.monotonic() - began
            if not missing:
                break
            if self.known is not None and self.nodes and waited > grace:
                log.warning("after %g s these clients are missing, and the run goes on: %s", grace, names)
                break
            if waited > seconds:
                text = f"flower.gather: after {seconds:g} s these clients are missing: {names}"
                log.error(text)
                raise TransportError(text)
            time.sleep(SLOW)
        if self.known is not None:
            self.counts = dict(enumerate(self.known.tolist())) | self.counts
        return torch.tensor([self.counts[client] for client in range(federation.clients)])

    def _admit(self) -> set[int]:
        """Ask nodes that nobody knows who they are, and take in those that have said so; the nodes that are there."""
        now = time.monotonic()
        infos = {info.node_id: getattr(info, "name", "") or "" for info in self.grid.get_nodes()}
        known = {*self.nodes.values()}
        for node in sorted(node for node in infos if node not in known and self._due.get(node, now) <= now):
            self._due[node] = math.inf
            self._asked[self._push(node, b"", {"ask": "hello", "run": self.run})] = node
        for number, node in [*self._asked.items()]:
            answer = self._pull(number) if number else Answer(None, {}, "the server's link does not know it")
            if answer is None:
                continue
            del self._asked[number]
            refusal = answer.why or self._welcome(node, infos.get(node, ""), answer.about)
            if refusal:
                self._due[node] = now + AGAIN
                log.warning("node %d%s is refused: %s", node, f" ({infos[node]})" if infos.get(node) else "", refusal)
        return {*infos}

    def _welcome(self, node: int, name: str, said: dict[str, Any]) -> str:
        """Take a node in as the client that it says it is; else why not."""
        client, samples = said.get("client"), said.get("samples")
        if type(client) is not int or not 0 <= client < self.population or type(samples) is not int or not 0 <= samples < MANY:
            return f"it says it is client {client!r} with {samples!r} samples"
        if self.names and self.names[client] != name:
            return f"it says it is client {client}, who is {self.names[client]}"
        if client in self.nodes:
            return f"it says it is client {client}, who is node {self.nodes[client]}"
        wrong = [f"{n} is {said.get(n)!r} there and {v!r} here" for n, v in self.about_task.items() if said.get(n) != v]
        if self.counts.get(client, samples) != samples:
            wrong.append(f"samples are {samples} there, and were {self.counts[client]} when the run was started")
        if wrong:
            return "; ".join(wrong)
        self.nodes[client], self.counts[client] = node, samples
        about = {"client": client}
        log.info(
            "%s is there, with %d samples: %d of %d", self.called[client], samples, len(self.nodes), self.population, extra=about
        )
        return ""


def about_task(federation: Federation) -> dict[str, Any]:
    """What of a task has to be the same wherever a run's data are."""
    split, problem = federation.split, federation.problem
    about = {"model": problem.layout.size, "inputs": [*split.train.x.shape[1:]], "names": [*split.names]}
    return about if not problem.fixed else {**about, "frozen": fingerprint(problem.fixed)}


def fingerprint(tensors: Tensors) -> str:
    """Tensors that are the same bits have the same one."""
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces({name: tensors[name] for name in sorted(tensors)}):
        digest.update(piece)
    return digest.hexdigest()


@contextmanager
def grows_by(most: int) -> Iterator[None]:
    """Within, a process that takes more than so many bytes beyond what it has raises ``MemoryError``; only Linux can do that."""
    if not STATM.exists():
        yield
        return
    import resource

    has = int(STATM.read_text().split()[5]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = [has + most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def too_large(most: int) -> str:
    """What is said of a reply that is."""
    return f"its reply is larger than any that can be right, {most / 1e6:.1f} MB"
