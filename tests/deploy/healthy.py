"""A federation in which all is well, a responder of it, and what a problem looks like."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from hanse.config import Settings
from hanse.deploy import doctor
from hanse.deploy.check import Check
from hanse.deploy.responder import Responder
from hanse.deploy.way import Server

NOW = datetime.now(UTC)
TOKEN = "not a secret"
CSV = "a,b,label\n" + "".join(f"{i},{i % 3},{'xy'[i % 2]}\n" for i in range(40))
RUN = Settings(task='table("points.csv", "label")', clients=2, cohort=2, engine="flower")


@contextmanager
def answering(own: Path, port: int, handler: type[BaseHTTPRequestHandler] | None = None) -> Iterator[None]:
    """A ``Responder`` with the certificate in a folder."""
    with Responder(own, "127.0.0.1", port, TOKEN, RUN) as server:
        server.RequestHandlerClass = handler or server.RequestHandlerClass
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def at(fed: Path, port: int) -> Server:
    return Server("127.0.0.1", port, fed / "nodes" / "ada" / "ca.pem")


def is_problem(check: Check, *words: str) -> None:
    assert check.state == "problem" and check.do, check
    assert all(word in check.found for word in words), check


def on_node(fed: Path, token: str | None = None, settings: Settings | None = None) -> dict[str, Check]:
    folder = fed / "nodes" / "ada"
    found = [*doctor.node(folder, doctor.server_for(folder, None), folder / "data", settings, token, datetime.now(UTC))]
    return {check.name: check for check in found}
