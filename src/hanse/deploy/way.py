"""What the doctor looks at between a node and its server: names, ports, TLS, clocks, what the other end says, bandwidth."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from hanse.core.errors import ConfigError
from hanse.deploy.check import RENEW, Check, ok, problem, warning
from hanse.deploy.responder import PATIENCE, PROBE

AHEAD, BEHIND = 5.0, 305.0
"""Seconds that Flower lets a node's clock be ahead of the server's, or behind it."""
LONG = 60.0
"""Seconds for a model to travel one way that are warned of."""
ADVICE = {
    **dict.fromkeys((7, 18, 19, 20), "that server has another authority: have its ca.pem here, or see whose server it is"),
    9: "set the clocks of both machines: the certificate is not valid yet",
    10: f"the certificate has expired: {RENEW}; or set the clock of this machine",
    62: f"call the server by a name in its certificate, or {RENEW}",
    64: f"call the server by an address in its certificate, or {RENEW}",
}
"""What to do about OpenSSL's numbers for what is wrong with a certificate."""


class Server(NamedTuple):
    """Where nodes find the server, and the authority's certificate that they know it by."""

    host: str
    port: int
    authority: Path


def resolves(host: str) -> Check:
    """The server's name has an address."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return problem("name", f"{host}: {error.strerror}", f"have {host} in the DNS or in /etc/hosts of this machine")
    return ok("name", f"{host} is {', '.join(found)}")


def free(where: Server) -> Check:
    """A port of the server's machine: free, or taken by a server with the right certificate."""
    name, here = f"port {where.port}", where._replace(host="127.0.0.1")
    do = "stop it, or write the federation anew for another port: nodes look for the server there"
    if reaches(here).state != "ok":
        return open_to_us("", where.port, do)
    greeting = handshake(here)
    if greeting.state == "ok":
        return ok(name, "the server answers there already, with this certificate")
    return problem(name, f"something else listens there: {greeting.found}", do)


def open_to_us(host: str, port: int, do: str) -> Check:
    """A port of this machine can be listened on."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        return problem(f"port {port}", f"cannot be listened on: {os.strerror(error.errno or 0)}", do)
    return ok(f"port {port}", "free")


def reaches(where: Server) -> Check:
    """Something accepts connections at the server's address."""
    name, address = "port", f"{where.host}:{where.port}"
    began = time.perf_counter()
    try:
        socket.create_connection((where.host, where.port), PATIENCE).close()
    except TimeoutError:
        return problem(name, f"{address} does not answer within {PATIENCE:g} s", "let it through all firewalls on the way")
    except ConnectionRefusedError:
        do = "start the server, with sh server/start.sh or with hanse doctor --listen, and look at its firewall"
        return problem(name, f"nothing listens at {address}", do)
    except OSError as error:
        return problem(name, f"{address}: {error.strerror or error}", "see that this machine has a way to the server")
    return ok(name, f"{address} answers in {1000 * (time.perf_counter() - began):.0f} ms")


def handshake(where: Server) -> Check:
    """The server proves to be the one that the authority signed for, under the name by which it is called."""
    try:
        with _line(where) as line:
            return ok("TLS", f"{line.sock.version()}, {where.host} is who it says")
    except ssl.SSLCertVerificationError as error:
        return problem("TLS", f"{where.host}: {error.verify_message}", ADVICE.get(error.verify_code, RENEW))
    except ConfigError as error:
        return problem("TLS", str(error), "have the authority's certificate, ca.pem, as the server has it")
    except OSError as error:  # as where the other end speaks no TLS
        found = f"{where.host}:{where.port} answers, but not so: {getattr(error, 'reason', None) or error.strerror or error}"
        return problem("TLS", found, "see what listens there: it is not the server")


def trust(where: Server) -> ssl.SSLContext:
    """Who is believed: the federation's own authority and nobody else; raises ``ConfigError``."""
    try:
        return ssl.create_default_context(cafile=where.authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{where.authority}: not a certificate: {error.strerror or error}") from None


def clock(where: Server) -> Check:
    """This machine's clock against the server's, as its replies give it."""
    try:
        with _line(where) as line:
            before = time.time()
            reply, _ = _ask(line, "HEAD", "/")
            took = time.time() - before
        said = parsedate_to_datetime(reply.getheader("Date", "")).timestamp() + 0.5  # whole seconds, cut off
    except (OSError, ValueError, http.client.HTTPException) as error:
        return warning("clock", f"the server does not say what time it is: {error}", "compare the clocks by hand")
    ahead = before + took / 2 - said
    unsure = 0.5 + took / 2
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's" if abs(ahead) > unsure else "as the server's"
    if ahead - unsure > AHEAD or ahead + unsure < -BEHIND:
        allowed = f"Flower lets a node be {AHEAD:g} s ahead and {BEHIND:g} s behind"
        return problem("clock", f"{found}; {allowed}", "set both clocks by NTP")
    if ahead > AHEAD / 2 or ahead < -BEHIND / 2:
        return warning("clock", found, "set both clocks by NTP")
    return ok("clock", found)


def asked(where: Server, token: str) -> dict[str, Any]:
    """What the server's ``Responder`` says of itself: ``versions`` and ``settings``. Raises ``ConfigError`` if it says nothing."""
    try:
        with _line(where) as line:
            reply, data = _ask(line, "GET", "/about", token)
        if reply.status == HTTPStatus.FORBIDDEN:
            raise ConfigError("it does not know this token")
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("versions"), dict) and isinstance(found.get("settings"), str):
            return found
    except (OSError, ValueError, http.client.HTTPException):
        pass
    raise ConfigError("what answers there is no doctor")


def bandwidth(where: Server, token: str, model: int) -> Check:
    """Bytes a second each way, and how long a model of so many bytes takes."""
    do = "see what is in the way of long messages, such as a proxy"
    try:
        with _line(where) as line:
            began = time.perf_counter()
            reply, data = _ask(line, "GET", f"/down/{PROBE}", token)
            down = PROBE / (time.perf_counter() - began)
            began = time.perf_counter()
            sent, _ = _ask(line, "POST", "/up", token, bytes(PROBE))
            up = PROBE / (time.perf_counter() - began)
    except (OSError, http.client.HTTPException) as error:
        return problem("bandwidth", f"the connection broke: {error}", do)
    if len(data) != PROBE or not (reply.status == sent.status == HTTPStatus.OK):
        return problem("bandwidth", "what was sent did not come through", do)
    found = f"{8e-6 * down:,.1f} Mbit/s down, {8e-6 * up:,.1f} Mbit/s up"
    if model:
        found += f"; a model takes {model / down:.2g} s down, {model / up:.2g} s up"
    slow = model / min(down, up) > LONG
    return warning("bandwidth", found, "have a better link, or a codec that sends less") if slow else ok("bandwidth", found)


@contextmanager
def _line(where: Server) -> Iterator[http.client.HTTPSConnection]:
    """A connection that is there: what is timed on it is no handshake."""
    line = http.client.HTTPSConnection(where.host, where.port, timeout=PATIENCE, context=trust(where))
    try:
        line.connect()
        yield line
    finally:
        line.close()


def _ask(
    line: http.client.HTTPSConnection, verb: str, path: str, token: str = "", body: bytes = b""
) -> tuple[http.client.HTTPResponse, bytes]:
    line.request(verb, path, body or None, {"Authorization": f"Bearer {token}"} if token else {})
    reply = line.getresponse()
    return reply, reply.read()
