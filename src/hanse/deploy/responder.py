"""What answers, before a run, the doctors of nodes that ask from outside: on the port that the server will have."""

from __future__ import annotations

import hmac
import json
import platform
import socket
import ssl
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hanse.config import Settings
from hanse.core.errors import ConfigError

PATIENCE = 10.0
"""Seconds to wait for a connection, and for each piece of what is sent."""
PROBE = 4 << 20
"""Bytes that are sent each way to measure bandwidth."""


def installed() -> dict[str, str]:
    """Versions by name, empty for what is not installed."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    return {"python": platform.python_version(), **{name: of(name) for name in ("torch", "hanse", "flwr")}}


def listens(host: str) -> str:
    """Where the server called ``host`` listens: to its own machine, if that is what nodes call it, else to all."""
    if host in ("localhost", "::1") or host.startswith("127."):
        return "127.0.0.1" if host == "localhost" else host
    return "::" if ":" in host else "0.0.0.0"


class Responder(ThreadingHTTPServer):
    """Answers nodes' doctors who know ``token``: over TLS with the certificate in ``own``, at ``host`` and ``port``.

    It has nothing to give but the settings, versions and zeros. Raises ``ConfigError`` where it cannot listen.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, own: Path, host: str, port: int, token: str, settings: Settings) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token, self.settings = token, settings
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            self.context.load_cert_chain(own / "server.pem", own / "server.key")
        except OSError as error:  # TLS's own errors are of this kind
            raise ConfigError(f"{own / 'server.pem'} and server.key: not a certificate and its key: {error.strerror}") from None
        try:
            super().__init__((host, port), Answers)
        except OSError as error:
            raise ConfigError(f"listen: {host}:{port} is not allowed: {error.strerror}") from None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Greet in the connection's own thread: who connects and says nothing holds up nobody else."""
        request.settimeout(PATIENCE)
        try:
            with self.context.wrap_socket(request, server_side=True) as secure:
                super().finish_request(secure, client_address)
        except OSError:
            pass  # it went away, or speaks no TLS


class Answers(BaseHTTPRequestHandler):
    """The replies of a ``Responder``."""

    protocol_version = "HTTP/1.1"
    server: Responder

    def do_HEAD(self) -> None:
        """Say what time it is; anybody may know."""
        self._send(b"")

    def do_GET(self) -> None:
        """What is installed and what is to be run; or so many zeros."""
        if not self._known():
            return
        if self.path == "/about":
            self._send(json.dumps({"versions": installed(), "settings": self.server.settings.toml()}).encode())
        elif self.path == f"/down/{PROBE}":
            self._send(bytes(PROBE))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Take what comes, and forget it."""
        if not self._known():
            return
        left = self.headers.get("Content-Length", "")
        if not left.isdecimal() or int(left) > PROBE:
            self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        rest = int(left)
        while rest and (piece := self.rfile.read(min(rest, 1 << 16))):
            rest -= len(piece)
        self._send(b"")

    def _known(self) -> bool:
        known = hmac.compare_digest(self.headers.get("Authorization", "").encode(), f"Bearer {self.server.token}".encode())
        if not known:
            self.send_error(HTTPStatus.FORBIDDEN)
        return known

    def _send(self, data: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what is asked for has a token beside it."""
