"""What stands in the way of a run, found before it: on the server, in the folder that ``hanse deploy`` wrote, and on every node.

Each check looks at one thing, for real, and says what it found and what to do: at this machine (``machine.py``), and at the way
between node and server (``way.py``). What takes both ends, versions and bandwidth, needs something that answers on the server: a
``Responder``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hanse.config import Settings
from hanse.core.errors import ConfigError
from hanse.deploy import keys
from hanse.deploy.check import RENEW, Check, problem, shown, warning
from hanse.deploy.machine import certificate, disk, own_data, pair, private_files, put_away, registered, task, versions
from hanse.deploy.way import Server, asked, bandwidth, clock, free, handshake, open_to_us, reaches, resolves

__all__ = ["node", "server", "server_for", "server_of", "settings_of", "shown"]


def server(folder: Path, now: datetime) -> Iterator[Check]:
    """The checks on the server, whose federation ``hanse deploy`` wrote into ``folder``."""
    own = folder / "server"
    where, inner = server_of(own), _port(own / "start.sh", r"PORT:-(\d+)")
    yield from versions({})
    yield from private_files([*own.glob("*.key")])
    yield certificate(own, where.host, now)
    yield put_away(folder)
    yield resolves(where.host)
    for port in sorted({where.port, inner}):
        yield free(where._replace(port=port))
    try:
        settings = settings_of(folder / "app" / "pyproject.toml")
    except ConfigError as error:
        yield problem("settings", str(error), "correct them in app/pyproject.toml")
    else:
        yield registered(own / "nodes", settings.clients)
        yield task(settings, own)
    yield disk(own)


def node(folder: Path, where: Server, data: Path, settings: Settings | None, token: str | None, now: datetime) -> Iterator[Check]:
    """The checks on a node: ``folder`` has its key, ``data`` its data; ``where`` is the server.

    With ``token`` the server's ``Responder`` is asked for its versions and for the ``settings``, if they are not given.
    """
    start, about = folder / "start.sh", dict[str, Any]()
    yield from private_files([*folder.glob("*.key")])
    yield pair(folder, now)
    do = "unless this node is running already, stop what has it, or take another one: PORT=... sh start.sh"
    mine = open_to_us("127.0.0.1", _port(start, r"PORT:-(\d+)"), do)
    yield mine if mine.state == "ok" else mine._replace(state="warning")
    yield resolves(where.host)
    connected = reaches(where)
    yield connected
    if connected.state == "ok":
        greeting = handshake(where)
        yield greeting
        if greeting.state == "ok":
            yield clock(where)
            try:
                about = asked(where, token) if token else {}
            except ConfigError as error:
                again = "give the --token that 'hanse doctor DIR --listen' shows on the server, while it shows it"
                yield problem("server", str(error), again)
    yield from versions(about.get("versions", {}))
    if settings is None and about:
        try:
            settings = Settings.read(None, tomllib.loads(about["settings"]))
        except (ConfigError, ValueError) as error:
            yield problem("settings", f"those of the server cannot be read here: {error}", "install the same hanse on both")
    found, size = own_data(folder, int(_found(start, r"client=(\d+)")), data, settings)
    yield found
    yield disk(folder)
    if not token:
        do = "have 'hanse doctor DIR --listen' run on the server, and give the --token that it shows"
        yield warning("bandwidth", "not measured", do)
    elif about:
        yield bandwidth(where, token, size)


def server_of(own: Path) -> Server:
    """Where the nodes of a server's folder find it: the first name in its certificate, and the port that is open to them."""
    from cryptography import x509

    made = keys.certificate(own / "server.pem")
    try:
        names = [str(entry.value) for entry in made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]
    except x509.ExtensionNotFound:
        names = []
    if not names:
        raise ConfigError(f"{own / 'server.pem'}: for no name at all; {RENEW}")
    gate = own / "nginx.conf"
    port = _port(gate, r"listen (\d+) ssl") if gate.is_file() else _port(own / "start.sh", r"PORT:-(\d+)")
    return Server(names[0], port, own / "ca.pem")


def server_for(folder: Path, address: str | None) -> Server:
    """Where a node of ``folder`` finds its server: at ``address``, ``host:port``, or as its start.sh says."""
    if address is None:
        address = _found(folder / "start.sh", r"--superlink (\S+)")
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host = ""
    if not host or not port:
        raise ConfigError(f"server: {address!r} is not allowed: host:port")
    return Server(host, port, folder / "ca.pem")


def settings_of(file: Path) -> Settings:
    """The settings in a settings file, or in the ``pyproject.toml`` of an app."""
    if file.name != "pyproject.toml":
        return Settings.read(file, {})
    try:
        text = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]["settings"]
        return Settings.read(None, tomllib.loads(text))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: not an app of hanse: {error}") from None


def _found(file: Path, pattern: str) -> str:
    try:
        found = re.search(pattern, file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; it is one of those that 'hanse deploy' writes") from None
    if found is None:
        raise ConfigError(f"{file}: not as 'hanse deploy' writes it: {pattern!r} is not in it")
    return found[1]


def _port(file: Path, pattern: str) -> int:
    port = int(_found(file, pattern))
    if not 0 < port < 1 << 16:
        raise ConfigError(f"{file}: port {port} is not allowed: 1 to 65535")
    return port
