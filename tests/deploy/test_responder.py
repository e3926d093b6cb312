"""What answers doctors: to those who know the token, as much as it says, and nobody waits for others."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from healthy import RUN, TOKEN, answering, at

pytest.importorskip("cryptography")

from hanse.core.errors import ConfigError
from hanse.deploy import way
from hanse.deploy.responder import Responder


def test_it_takes_no_more_than_it_says(fed: Path, port: int) -> None:
    with answering(fed / "server", port), way._line(at(fed, port)) as line:
        line.request("POST", "/up", headers={"Authorization": f"Bearer {TOKEN}", "Content-Length": str(1 << 40)})
        assert line.getresponse().status == 413


def test_who_says_nothing_holds_up_nobody(fed: Path, port: int) -> None:
    with answering(fed / "server", port), socket.create_connection(("127.0.0.1", port)):
        assert way.handshake(at(fed, port)).state == "ok"


def test_what_cannot_be_listened_on_is_one_line(fed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match=r"listen: .* Address already in use"):
        Responder(fed / "server", "127.0.0.1", taken.getsockname()[1], TOKEN, RUN)
    shutil.copy(fed / "nodes" / "ada" / "ada.key", fed / "server" / "server.key")
    with pytest.raises(ConfigError, match=r"server.pem and server.key: not a certificate and its key: "):
        Responder(fed / "server", "127.0.0.1", 0, TOKEN, RUN)
