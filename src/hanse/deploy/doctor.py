"""What stands in the way of a run, found before it: on the server, in the folder that ``hanse deploy`` wrote, and on every node.

Each check looks at one thing, for real, and says what it found and what to do. What takes both ends, versions and bandwidth, needs
something that answers on the server: a ``Responder``.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import time
import tomllib
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from hanse.config import Settings
from hanse.core.errors import ConfigError, HanseError
from hanse.deploy import keys
from hanse.deploy.app import FLOWER
from hanse.deploy.responder import PATIENCE, PROBE, installed
from hanse.deploy.share import one_of_each, with_own_data

AHEAD, BEHIND = 5.0, 305.0
"""Seconds that Flower lets a node's clock be ahead of the server's, or behind it."""
SOON = timedelta(days=30)
"""Certificates that end so soon are warned of."""
LEAST_FREE, SCARCE = 100 << 20, 2 << 30
"""Bytes free on a disk: fewer are a problem, or a warning."""
LONG = 60.0
"""Seconds for a model to travel one way that are warned of."""
RENEW = "write the federation anew with 'hanse deploy', or sign another certificate with its authority"


class Check(NamedTuple):
    """What was looked at, how it is, what was found, and what to do about it (nothing where it is ok)."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    do: str = ""


class Server(NamedTuple):
    """Where nodes find the server, and the authority's certificate that they know it by."""

    host: str
    port: int
    authority: Path


def ok(name: str, found: str) -> Check:
    """Nothing to do."""
    return Check(name, "ok", found)


def warning(name: str, found: str, do: str) -> Check:
    """A run will do, but."""
    return Check(name, "warning", found, do)


def problem(name: str, found: str, do: str) -> Check:
    """A run will not do."""
    return Check(name, "problem", found, do)


# ---- what to look at


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
    yield from private_files([*folder.glob("*.key")])
    yield pair(folder, now)
    mine = open_to_us("127.0.0.1", _port(folder / "start.sh", r"PORT:-(\d+)"))
    yield mine if mine.state == "ok" else warning(mine.name, mine.found, f"unless this node is running already, {mine.do}")
    yield resolves(where.host)
    connected = reaches(where)
    yield connected
    answer = None
    if connected.state != "problem":
        greeting = handshake(where)
        yield greeting
        if greeting.state == "ok":
            yield clock(where)
            answer = asked(where, token) if token else None
    about = answer if isinstance(answer, dict) else {}
    if isinstance(answer, Check):
        yield answer
    yield from versions(about.get("versions", {}))
    if settings is None and "settings" in about:
        settings = Settings.read(None, tomllib.loads(about["settings"]))
    found, size = own_data(folder, data, settings)
    yield found
    yield disk(folder)
    if about and token:
        yield bandwidth(where, token, size)
    elif token is None:
        do = "have 'hanse doctor DIR --listen' run on the server, and give the --token that it shows"
        yield warning("bandwidth", "not measured", do)


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
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
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
    return int(_found(file, pattern))


# ---- this machine


def versions(there: dict[str, str]) -> Iterator[Check]:
    """What is installed here, against what ``there`` is on the server, as far as that is known."""
    for name, here in installed().items():
        theirs = there.get(name, here)
        if not here:
            yield problem(name, "not installed", "pip install 'hanse[flower]'")
        elif name in ("hanse", "flwr") and theirs != here:
            yield problem(name, f"{here} here, {theirs} on the server", "install the same on both")
        elif name == "flwr" and here != FLOWER:
            yield warning(name, f"{here}; hanse was tried with {FLOWER}", f"pip install flwr=={FLOWER}")
        elif theirs != here:
            yield warning(name, f"{here} here, {theirs} on the server", "nothing, unless runs are to repeat to the last bit")
        else:
            yield ok(name, here + (", as on the server" if name in there else ""))


def private_files(files: list[Path]) -> Iterator[Check]:
    """Private keys are for their owner alone."""
    open_ = [file for file in files if file.stat().st_mode & 0o077]
    for file in open_:
        found = f"{file} has mode {file.stat().st_mode & 0o777:o}: others may read it"
        yield problem("key files", found, f"chmod 600 {file}; if others have been there, make new keys")
    if not open_:
        yield ok("key files", f"{len(files)}, for their owner alone") if files else problem("key files", "none", RENEW)


def certificate(own: Path, host: str, now: datetime) -> Check:
    """The server's certificate, its authority's, and its key."""
    try:
        until = keys.check_server(own, [host], now)
    except ConfigError as error:
        return problem("certificate", str(error), RENEW)
    if until - now < SOON:
        return warning("certificate", f"ends on {until:%Y-%m-%d %H:%M} UTC", RENEW)
    return ok("certificate", f"for {host}, good until {until:%Y-%m-%d}")


def put_away(folder: Path) -> Check:
    """Private files that are not needed here."""
    left = [folder / "server" / "ca.key"] if (folder / "server" / "ca.key").exists() else []
    left += sorted((folder / "nodes").glob("*/*.key"))
    if left:
        names = ", ".join(str(file.relative_to(folder)) for file in left)
        return warning("put away", names, "keep ca.key where no network is; give nodes their folders and delete them here")
    return ok("put away", "no private key lies here that is not needed")


def registered(folder: Path, clients: int) -> Check:
    """The public keys of the nodes that may join."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    files = sorted(folder.glob("*.pub"))
    for file in files:
        try:
            load_ssh_public_key(file.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            return problem("nodes", f"{file}: not a public key in OpenSSH's format: {error}", "ask that node for its key again")
    if len(files) != clients:
        do = "have as many keys in server/nodes as the settings have clients"
        return problem("nodes", f"{len(files)} public keys for {clients} clients", do)
    return ok("nodes", ", ".join(file.stem for file in files))


def task(settings: Settings, own: Path) -> Check:
    """The run's parts, and its task on the server, which runs in ``own`` and needs test samples."""
    try:
        parts = one_of_each(settings)
        if parts.engine.short_name != "flower":
            return problem("settings", f"engine: {parts.engine}", "have engine = 'flower' in app/pyproject.toml")
        with chdir(own):
            federation = settings.federation(settings.seed[0])
            split, size = federation.split, federation.problem.layout.size
    except HanseError as error:
        return problem("settings", str(error), "correct them in app/pyproject.toml")
    if not len(split.test_x):
        do = "have some in the task: the server tells from one of its own what replies have to look like"
        return problem("settings", f"{settings.task} has no test samples on the server", do)
    what = f"{parts.methods[0].short_name} on {settings.task}"
    return ok("settings", f"{what}, {size:,} parameters, {len(split.test_x):,} test samples here")


def pair(folder: Path, now: datetime) -> Check:
    """A node's key pair, and the authority's certificate."""
    names = [file.stem for file in sorted(folder.glob("*.key"))]
    if len(names) != 1:
        return problem("key", f"{len(names)} private keys in {folder}", "have the one that 'hanse deploy' made for this node")
    try:
        keys.check_node(folder, names[0])
        authority = keys.certificate(folder / "ca.pem")
    except ConfigError as error:
        return problem("key", str(error), "ask whoever runs the server for this node's folder")
    for bad, said in (
        (now > authority.not_valid_after_utc, "expired on"),
        (now < authority.not_valid_before_utc, "not valid before"),
    ):
        if bad:
            when = authority.not_valid_after_utc if said == "expired on" else authority.not_valid_before_utc
            found = f"{folder / 'ca.pem'}: {said} {when:%Y-%m-%d %H:%M} UTC"
            return problem("key", found, "set this machine's clock if it is wrong; else ask for a new certificate")
    return ok("key", f"of {names[0]}; the authority is good until {authority.not_valid_after_utc:%Y-%m-%d}")


def own_data(folder: Path, data: Path, settings: Settings | None) -> tuple[Check, int]:
    """A node's data, read as the run will read them; and the bytes of a model, 0 where the task is not known."""
    if not data.is_dir():
        return problem("data", f"{data}: no folder", "name the folder with this node's data: --data"), 0
    if not os.access(data, os.R_OK | os.X_OK):
        return problem("data", f"{data}: cannot be read by this user", f"chmod u+rx {data}, or be the user who may"), 0
    if settings is None:
        do = "give the run's settings with --settings, or have the server's by --token"
        return warning("data", f"{data}: there; what the run's task makes of it is not known", do), 0
    client, held = int(_found(folder / "start.sh", r"client=(\d+)")), data.resolve()
    try:
        with chdir(folder):  # which is where the node will be
            federation = with_own_data(settings, client, held)
            split, layout = federation.split, federation.problem.layout
    except (HanseError, OSError) as error:
        return problem("data", " ".join(str(error).split()), f"have in {data} what {settings.task} reads"), 0
    size, count = layout.size * federation.problem.start.element_size(), len(split.train.x)
    if not count:
        return problem("data", f"{data}: no samples", f"have in {data} what {settings.task} reads"), size
    labels = split.train.y
    present = len(set(labels.tolist())) if split.names and labels.dim() == 1 else 0
    of_classes = f", {present} of {len(split.names)} classes" if present else ""
    return ok("data", f"{count:,} samples{of_classes}, for {settings.task}"), size


def disk(folder: Path) -> Check:
    """Room for what is written beside ``folder``."""
    free_ = shutil.disk_usage(folder).free
    found = f"{free_ / 1e9:.1f} GB free where {folder} is"
    if free_ < LEAST_FREE:
        return problem("disk", found, "make room: models and checkpoints are written there")
    return warning("disk", found, "make room, unless the model is small") if free_ < SCARCE else ok("disk", found)


# ---- the way between


def resolves(host: str) -> Check:
    """The server's name has an address."""
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return problem("name", f"{host}: {error.strerror}", f"have {host} in the DNS or in /etc/hosts of this machine")
    return ok("name", f"{host} is {', '.join(found)}")


def free(where: Server) -> Check:
    """A port of this machine: free, or taken by a server with the right certificate."""
    name = f"port {where.port}"
    if reaches(where._replace(host="127.0.0.1")).state == "ok":
        greeting = handshake(where._replace(host="127.0.0.1"))
        if greeting.state == "ok":
            return ok(name, "the server answers there already, with this certificate")
        return problem(
            name, f"something else listens there: {greeting.found}", "stop it, or take another one: PORT=... sh start.sh"
        )
    return open_to_us("", where.port)


def open_to_us(host: str, port: int) -> Check:
    """A port of this machine can be listened on."""
    name = f"port {port}"
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        do = "stop what has it, or take another one: PORT=... sh start.sh"
        return problem(name, f"cannot be listened on: {os.strerror(error.errno or 0)}", do)
    return ok(name, "free")


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
        with (
            socket.create_connection((where.host, where.port), PATIENCE) as plain,
            trust(where).wrap_socket(plain, server_hostname=where.host) as secure,
        ):
            return ok("TLS", f"{secure.version()}, {where.host} is who it says")
    except ssl.SSLCertVerificationError as error:
        return problem("TLS", f"{where.host}: {error.verify_message}", ADVICE.get(error.verify_code, RENEW))
    except ConfigError as error:
        return problem("TLS", str(error), "have the authority's certificate, ca.pem, as the server has it")
    except OSError as error:  # as where the other end speaks no TLS
        found = getattr(error, "reason", None) or error.strerror or error
        return problem(
            "TLS", f"{where.host}:{where.port} answers, but not so: {found}", "see what listens there: it is not the server"
        )


ADVICE = {
    9: "set the clocks of both machines: the certificate is not valid yet",
    10: f"the certificate has expired: {RENEW}; or set the clock of this machine",
    18: "that server has another authority: have its ca.pem here, or see whose server it is",
    19: "that server has another authority: have its ca.pem here, or see whose server it is",
    20: "that server has another authority: have its ca.pem here, or see whose server it is",
    62: f"call the server by a name in its certificate, or {RENEW}",
    64: f"call the server by an address in its certificate, or {RENEW}",
    7: "that server has another authority: have its ca.pem here, or see whose server it is",
}
"""What to do about OpenSSL's numbers for what is wrong with a certificate."""


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
    except (OSError, http.client.HTTPException) as error:
        return warning("clock", f"the server does not say what time it is: {error}", "compare the clocks by hand")
    date = reply.getheader("Date")
    if date is None:
        return warning("clock", "the server does not say what time it is", "compare the clocks by hand")
    said = parsedate_to_datetime(date).timestamp() + 0.5  # whole seconds, cut off
    ahead = before + took / 2 - said
    unsure = 0.5 + took / 2
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's" if abs(ahead) > unsure else "as the server's"
    if ahead - unsure > AHEAD or ahead + unsure < -BEHIND:
        allowed = f"Flower lets a node be {AHEAD:g} s ahead and {BEHIND:g} s behind"
        return problem("clock", f"{found}; {allowed}", "set both clocks by NTP")
    if ahead > AHEAD / 2 or ahead < -BEHIND / 2:
        return warning("clock", found, "set both clocks by NTP")
    return ok("clock", found)


def asked(where: Server, token: str) -> dict[str, Any] | Check:
    """What the server's ``Responder`` says of itself."""
    again = "give the --token that 'hanse doctor DIR --listen' shows on the server, while it shows it"
    try:
        with _line(where) as line:
            reply, data = _ask(line, "GET", "/about", token)
        if reply.status == HTTPStatus.FORBIDDEN:
            return problem("server", "it does not know this token", again)
        found = json.loads(data)
        if isinstance(found, dict) and isinstance(found.get("versions"), dict) and isinstance(found.get("settings"), str):
            return found
    except (OSError, ValueError, http.client.HTTPException):
        pass
    return problem("server", "what answers there is no doctor", again)


def bandwidth(where: Server, token: str, model: int) -> Check:
    """Bytes a second each way, and how long a model of so many bytes takes."""
    try:
        with _line(where) as line:
            began = time.perf_counter()
            reply, data = _ask(line, "GET", f"/down/{PROBE}", token)
            down = PROBE / (time.perf_counter() - began)
            began = time.perf_counter()
            sent, _ = _ask(line, "POST", "/up", token, bytes(PROBE))
            up = PROBE / (time.perf_counter() - began)
    except (OSError, http.client.HTTPException) as error:
        return problem("bandwidth", f"the connection broke: {error}", "see what is in the way of long messages, such as a proxy")
    if len(data) != PROBE or not (reply.status == sent.status == HTTPStatus.OK):
        return problem(
            "bandwidth", "what was sent did not come through", "see what is in the way of long messages, such as a proxy"
        )
    found = f"{8e-6 * down:,.1f} Mbit/s down, {8e-6 * up:,.1f} Mbit/s up"
    slow = model / min(down, up)
    if model:
        found += f"; a model takes {model / down:.2g} s down, {model / up:.2g} s up"
    return warning("bandwidth", found, "have a better link, or a codec that sends less") if slow > LONG else ok("bandwidth", found)


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


def shown(check: Check) -> str:
    """A check as a line, and what to do as another."""
    line = f"{check.state:8} {check.name:12} {check.found}"
    return line + (f"\n{'':22}-> {check.do}" if check.do else "")
