"""A folder from which a federation is started with Flower's own commands.

====================  ======================================================================  =========================
in the folder         what it is                                                              who gets it
====================  ======================================================================  =========================
``README.md``         all commands, in order                                                  everybody
``app/``              what ``flwr run`` bundles and sends: ``pyproject.toml`` with settings   all nodes, by Flower
``server/``           authority, certificate, keys of the nodes that may join, scripts        the server
``nodes/<name>/``     the node's private key, the authority's certificate, a script           that node
====================  ======================================================================  =========================

Whoever reaches a SuperLink's port may submit programs to all; node authentication covers the paths below ``/v1/fleet/`` alone. So
it listens to its own machine, and where nodes come from elsewhere ``server/nginx.conf`` passes them those paths and no others.

``flwr run`` bundles files below ``app/``, which holds ``pyproject.toml`` and nothing else: keys lie beside it, never in it.

The app's components are ``hanse.deploy.server:app`` and ``hanse.deploy.client:app``. They find in the run's configuration
(``context.run_config``) ``settings``, the text of a settings file, and ``folder``, the run folder on the server; a node finds in
its own (``context.node_config``) ``client``, its number, from 0 in the order of ``names``, and ``data``, where its data are. The
server knows nodes by the names they were registered with (``NodeInfo.name``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from hanse.config import Settings
from hanse.core.errors import ConfigError
from hanse.deploy import keys

FLOWER = "1.41.0"
"""The version that the commands were tried with; from one to the next they change."""
PORT = 8000
"""Flower's own choice for the SuperLink."""
NODE_PORT = 9094
"""Flower's own choice for a SuperNode, which listens to its own machine; nodes of one machine take the next ones."""

QUIET = 'export FLWR_HOME="$PWD/flower" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1'
"""Flower keeps what it writes in the folder, tells nobody, and looks for no new version on the net."""

PYPROJECT = """\
# What 'flwr run' sends to the server and to all nodes. hanse itself must be installed there.
[project]
name = "{name}"
version = "1.0.0"
description = "A run of hanse"
license = {{ text = "none" }}
dependencies = []

[tool.flwr.app]
publisher = "hanse"

[tool.flwr.app.components]
serverapp = "hanse.deploy.server:app"
clientapp = "hanse.deploy.client:app"

[tool.flwr.app.config]
folder = "run"
names = "{names}"
settings = {settings}
"""

START = """\
#!/bin/sh
# The SuperLink, for this machine alone. What it must remember is in state.db; packages of an app are never installed.
cd "$(dirname "$0")" || exit
{quiet}
mkdir -p flower
exec flower-superlink --host "${{HOST:-127.0.0.1}}" --port "${{PORT:-{inner}}}" --database state.db \\
  --ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key \\
  --enable-supernode-auth --disable-runtime-dependency-installation
"""

FLWR = """\
#!/bin/sh
# Flower's command line for this server: 'sh flwr.sh ls', 'sh flwr.sh log RUN', 'sh flwr.sh stop RUN', 'sh flwr.sh supernode list'.
cd "$(dirname "$0")" || exit
{quiet}
mkdir -p flower
cat > flower/config.toml <<END
[superlink]
default = "hanse"

[superlink.hanse]
address = "127.0.0.1:${{PORT:-{inner}}}"
root-certificates = "$PWD/ca.pem"
END
exec flwr "$@"
"""

NGINX = """\
# nginx between the nodes and the SuperLink: it passes what nodes ask for, /v1/fleet/, and nothing else.
daemon off;
pid nginx.pid;
events {{ }}
http {{
  access_log off;
  client_max_body_size 16m;
  client_body_temp_path nginx-body;
  proxy_temp_path nginx-proxy;
  fastcgi_temp_path nginx-fastcgi;
  uwsgi_temp_path nginx-uwsgi;
  scgi_temp_path nginx-scgi;
  server {{
    listen {port} ssl;
    listen [::]:{port} ssl;
    ssl_certificate server.pem;
    ssl_certificate_key server.key;
    location /v1/fleet/ {{
      proxy_pass https://127.0.0.1:{inner};
      proxy_ssl_name localhost;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate ca.pem;
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_read_timeout 600;
    }}
    location / {{
      return 403;
    }}
  }}
}}
"""

REGISTER = """\
#!/bin/sh
# Tell the SuperLink, once, which nodes may join: those whose public keys are in nodes/.
cd "$(dirname "$0")" || exit
for key in nodes/*.pub; do
  sh flwr.sh supernode register "$key" --name "$(basename "$key" .pub)" || failed=1
done
exit ${failed:-0}
"""

NODE = """\
#!/bin/sh
# The SuperNode {name}. Its data: the folder named as first argument, else data/ beside this file if there is one.
# A node that is not registered yet, or was killed and is missed only after a minute, is refused: it tries again.
data=$(cd "${{1:-$(dirname "$0")}}" && pwd) || exit
[ $# -gt 0 ] || data=$data/data
cd "$(dirname "$0")" || exit
{quiet}
mkdir -p flower
trap 'kill "$process"; wait "$process"; exit' INT TERM
while :; do
  flower-supernode --superlink {address} --root-certificates ca.pem \\
    --auth-supernode-private-key {name}.key --port "${{PORT:-{port}}}" \\
    --node-config "client={client} data='$data'" &
  process=$! && wait "$process" && exit
  sleep 10 & process=$! && wait "$process"
done
"""

README = """\
# {name}

A federation of {count} nodes on Flower {flower}. On every machine: Python 3.11 or newer and `pip install 'hanse[flower]'`.

## Start

1. `server/` stays on the server, which the nodes must reach as `{address}`. Every folder in `nodes/` goes to its node, over a way
   that nobody else reads, and is then deleted here: it holds the node's private key. (A node may also make its own:
   `ssh-keygen -t ecdsa -b 384 -N '' -C '' -f NAME.key`, and send `NAME.key.pub`, which becomes `server/nodes/NAME.pub`.)
2. On the server: `sh server/start.sh`, and in a second terminal, once: `sh server/register.sh`{gate}
3. On each node, with its data:

{nodes}

4. On the server: `sh server/flwr.sh run ../app --stream`

Each script is a few lines around one of Flower's own commands. Several nodes may run on one machine: each listens to
a port of its own, {node_port} and the next ones, which only that machine sees.

## See and stop

| what | command |
|---|---|
| nodes | `sh server/flwr.sh supernode list` |
| runs, how they ended, their bytes | `sh server/flwr.sh ls` |
| a run's log | `sh server/flwr.sh log RUN` |
| stop a run | `sh server/flwr.sh stop RUN` |
| stop a node or the server | Ctrl-C, or SIGTERM |
| a node that may come no more | `sh server/flwr.sh supernode unregister NODE` |

The server's results are in `server/run`. If the server stops, start it again, and `sh server/flwr.sh run ../app`: it goes on there.

## What is safe, and what is not

- Everything travels under TLS with a certificate of your own authority, good until {until}. Put `server/ca.key` away: it is needed
  for a new certificate alone.
- Nodes prove who they are with keys that were registered. A node's key lasts until it is unregistered.
- **Whoever reaches the SuperLink's own port, {inner}, can submit an app, and an app is a program that runs on the server and on
  every node**: Flower asks for no password there; nodes' keys are asked for below `/v1/fleet/` alone. So the SuperLink listens to
  its own machine, which should have no users that are not trusted. The same is true of a node's machine.
- A node trusts its server: run it as a user that may read its data and nothing else.
- Flower's telemetry and its look for updates are off in all scripts, and no script installs packages.
"""


GATE = """

   In a third, nginx (1.19.5 or newer) lets nodes in from outside, and nobody to anything else:
   `nginx -e stderr -p server -c nginx.conf`
"""


def write(
    settings: Settings,
    folder: Path,
    names: Sequence[str],
    address: str,
    days: float = 365,
    now: datetime | None = None,
) -> None:
    """Write the folder of a federation whose nodes are called ``names`` and reach the server at ``address``, ``host[:port]``.

    ``days`` is how long certificates last from ``now`` on. Raises ``ConfigError``: the folder holds something already, a name or
    the address is not allowed, or ``settings.clients`` is not the number of names.
    """
    now = datetime.now(UTC) if now is None else now
    host, port = _address(address)
    for name in names:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name):
            raise ConfigError(f"names: {name!r} is not allowed: at most 32 letters, digits, - and _, the first no sign")
    twice = sorted({name for name in names if [n.casefold() for n in names].count(name.casefold()) > 1})
    if twice or not names:
        raise ConfigError(f"names: {', '.join(names) or 'none'} is not allowed: " + ("each name once" if twice else "at least one"))
    if settings.clients != len(names):
        raise ConfigError(f"clients: {settings.clients} is not allowed: {len(names)} nodes are named")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: not empty; a federation is written into a folder of its own")

    own = folder / "server"
    keys.authority(own, days, now)
    keys.server(own, list(dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])), days, now)
    until = keys.check_server(own, [host], now)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    alone = host == "localhost" or host == "::1" or host.startswith("127.")
    inner = port if alone else port + 1
    _script(own / "start.sh", START.format(quiet=QUIET, inner=inner))
    _script(own / "flwr.sh", FLWR.format(quiet=QUIET, inner=inner))
    _script(own / "register.sh", REGISTER)
    if not alone:
        _text(own / "nginx.conf", NGINX.format(port=port, inner=inner))
    for i, name in enumerate(names):
        there = folder / "nodes" / name
        keys.node(there, name)
        _text(own / "nodes" / f"{name}.pub", (there / f"{name}.pub").read_text())
        _text(there / "ca.pem", (own / "ca.pem").read_text())
        _script(there / "start.sh", NODE.format(quiet=QUIET, name=name, address=where, port=NODE_PORT + i, client=i))
    label = bundle(settings, folder / "app", names)
    nodes = "\n".join(f"   `sh nodes/{name}/start.sh /path/to/its/data`" for name in names)
    text = README.format(
        name=label,
        count=len(names),
        flower=FLOWER,
        gate="" if alone else GATE,
        address=where,
        nodes=nodes,
        node_port=NODE_PORT,
        until=f"{until:%Y-%m-%d}",
        inner=inner,
    )
    _text(folder / "README.md", text)


def bundle(settings: Settings, folder: Path, names: Sequence[str]) -> str:
    """Write what ``flwr run`` takes into ``folder``, and nothing else; what Flower calls the app."""
    label = re.sub("[^a-z0-9]+", "-", folder.resolve().parent.name.lower()).strip("-")
    label = f"hanse-{label}"[:32].strip("-")
    _text(folder / "pyproject.toml", PYPROJECT.format(name=label, names=" ".join(names), settings=_literal(settings.toml())))
    return label


def _address(address: str) -> tuple[str, int]:
    """Host and port; an IPv6 address with a port is in brackets."""
    found = re.fullmatch(r"\[(?P<six>[0-9A-Fa-f:.]+)\](:(?P<p>\d+))?|(?P<host>[A-Za-z0-9.-]+)(:(?P<port>\d+))?", address)
    port = int((found["p"] or found["port"] or PORT) if found else 0)
    if found is None or not 0 < port < 65535:
        raise ConfigError(
            f"address: {address!r} is not allowed: host:port, e.g. training.example.org:{PORT} or [2001:db8::1]:{PORT}"
        )
    return found["six"] or found["host"], port


def _literal(text: str) -> str:
    """``text`` as a TOML string, over several lines where that is possible."""
    return f"'''\n{text}'''" if "'''" not in text else json.dumps(text, ensure_ascii=False)


def _script(file: Path, text: str) -> None:
    _text(file, text)
    file.chmod(0o755)


def _text(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {os.strerror(error.errno or 0)}") from None
