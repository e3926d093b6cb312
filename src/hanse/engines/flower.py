"""Real clients behind Flower's deployment engine: letters as Flower messages, over its Grid.

This module talks to the Grid that it is given and imports nothing of Flower but the types of messages, when it is used. The other
half, the apps that Flower starts, is ``hanse.deploy``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import PositiveFloat, model_validator

from hanse.core.errors import ConfigError, MissingExtraError, TransportError
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
AGAIN = 30.0
"""Seconds after which a node that was refused at the start is asked again."""


class flower(Engine):
    """Real clients, each a Flower SuperNode: 'hanse deploy' writes the app that is run there."""

    grace: PositiveFloat = 60.0
    """Seconds for which a client may be out of reach before the round goes on without it."""
    gather: PositiveFloat = 600.0
    """Seconds to wait for all clients to be there at the start."""

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
        counts = link.post.gather(federation, link.run, self.gather)
        run["names"] = [link.post.called[client] for client in range(federation.clients)]
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


class GridPost:
    """A ``Post`` over Flower's Grid. ``names`` are the clients', by their numbers, as their keys were registered; without names,
    whoever first says it is a client is that client for the run.
    """

    def __init__(self, grid: Any, names: list[str]) -> None:
        self.grid, self.names = grid, names
        self.nodes: dict[int, int] = {}
        """Flower's numbers of the nodes, by client."""
        self.called: dict[int, str] = {}
        """What clients are called: as their keys were registered, else by their numbers."""
        self.open: dict[str, tuple[int, int]] = {}
        """Letters and clients, by the message that replies are asked for by."""
        self.unsent: list[Returned] = []
        self.envelope = 0
        """Bytes sent and received beside letters."""

    def _push(self, node: int, data: bytes, about: Mapping[str, Any]) -> str:
        content = packed(data, about)
        message = records().Message(content, dst_node_id=node, message_type="train", group_id=str(about.get("version", "")))
        (number,) = self.grid.push_messages([message])
        self.envelope += len(json.dumps(about))
        return str(number or "")

    def send(self, letter: int, client: int, data: bytes, about: Mapping[str, Any]) -> None:
        """See ``Post``."""
        try:
            number = self._push(self.nodes[client], data, {**about, "letter": letter, "client": client, "ask": "work"})
        except (ValueError, RuntimeError, OSError) as error:
            said = "client %d: what it was sent did not get to the server's link: %s"
            log.warning(said, client, error, extra={"client": client})
            number = ""
        if number:
            self.open[number] = (letter, client)
        else:
            self.unsent.append(Returned(letter, client, None, "the server's link does not know it any more"))

    def collect(self, seconds: float) -> list[Returned]:
        """See ``Post``."""
        end = time.monotonic() + seconds
        while True:
            found, self.unsent = self.unsent, []
            found += [Returned(*self._open(m), *content) for m, content in self._pulled([*self.open])]
            if found or time.monotonic() >= end:
                return found
            time.sleep(min(SLOW, max(0.0, end - time.monotonic())))

    def _open(self, message: Any) -> tuple[int, int]:
        return self.open.pop(message.metadata.reply_to_message_id)

    def _pulled(self, numbers: list[str]) -> Iterable[tuple[Any, tuple[bytes | None, str]]]:
        """Replies to some messages: the bytes, or why there are none."""
        for message in self.grid.pull_messages(numbers) if numbers else ():
            yield message, self._content(message)

    def _content(self, message: Any) -> tuple[bytes | None, str]:
        if message.has_error():
            return None, f"error {message.error.code} there: {message.error.reason}"
        try:
            data, about = unpacked(message.content)
        except TransportError as error:
            return None, str(error)
        self.envelope += len(json.dumps(about))
        return (None, str(about["error"])) if "error" in about else (data, "")

    def reached(self) -> set[int]:
        """See ``Post``."""
        there = {*self.grid.get_node_ids()}
        return {client for client, node in self.nodes.items() if node in there}

    # ---- at the start

    def gather(self, federation: Federation, run: str, seconds: float) -> Tensor:
        """Wait until all clients of ``federation`` have said who they are; their numbers of samples, int64 ``[N]``.

        Who has another task, another model, or says it is somebody else, is refused, and asked again after a while, because a node
        can be mended. Raises ``TransportError`` when time is up.
        """
        counts: dict[int, int] = {}
        asked: dict[str, int] = {}
        due: dict[int, float] = {}
        end = time.monotonic() + seconds
        while len(counts) < federation.clients:
            now = time.monotonic()
            infos = {info.node_id: getattr(info, "name", "") or "" for info in self.grid.get_nodes()}
            for node in sorted(node for node in infos if due.get(node, now) <= now):
                due[node] = math.inf
                asked[self._push(node, b"", {"ask": "hello", "run": run})] = node
            for message, (_, why) in self._pulled([number for number in asked if number]):
                node = asked.pop(message.metadata.reply_to_message_id)
                refusal = why or self._welcome(node, infos.get(node, ""), unpacked(message.content)[1], federation, counts)
                if refusal:
                    due[node] = now + AGAIN
                    log.warning("node %d%s is refused: %s", node, f" ({infos[node]})" if infos.get(node) else "", refusal)
            if len(counts) < federation.clients and now > end:
                missing = [self.names[i] if self.names else str(i) for i in range(federation.clients) if i not in counts]
                text = f"flower.gather: after {seconds:g} s these clients are missing: {', '.join(missing)}"
                log.error(text)
                raise TransportError(text)
            time.sleep(SLOW)
        return torch.tensor([counts[i] for i in range(federation.clients)])

    def _welcome(self, node: int, name: str, said: dict[str, Any], federation: Federation, counts: dict[int, int]) -> str:
        """Take a node in as the client that it says it is; else why not."""
        client, samples = said.get("client"), said.get("samples")
        if type(client) is not int or not 0 <= client < federation.clients or type(samples) is not int or not 0 <= samples < MANY:
            return f"it says it is client {client!r} with {samples!r} samples"
        if self.names and self.names[client] != name:
            return f"it says it is client {client}, who is {self.names[client]}"
        if client in self.nodes:
            return f"it says it is client {client}, who is node {self.nodes[client]}"
        mine = about_task(federation)
        wrong = [f"{n} is {said.get(n)!r} there and {v!r} here" for n, v in mine.items() if said.get(n) != v]
        if wrong:
            return "; ".join(wrong)
        self.nodes[client], counts[client] = node, samples
        self.called[client] = name or (self.names[client] if self.names else str(client))
        about = {"client": client}
        log.info(
            "%s is there, with %d samples: %d of %d", self.called[client], samples, len(counts), federation.clients, extra=about
        )
        return ""


def about_task(federation: Federation) -> dict[str, Any]:
    """What of a task has to be the same wherever a run's data are."""
    split, problem = federation.split, federation.problem
    return {"model": problem.layout.size, "inputs": [*split.train.x.shape[1:]], "names": [*split.names]}
