"""Flower's ClientApp: one client of a run, started anew for every message.

``context.node_config`` has ``client``, its number, and ``data``, the folder of its data. What the client keeps lies in the folder
``kept`` where its SuperNode was started.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from hanse.config import Settings
from hanse.core.errors import HanseError, TransportError
from hanse.deploy.share import one_of_each, run_name, with_own_data
from hanse.engines.flower import about_task, packed, unpacked
from hanse.engines.participant import Participant

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do what the server asks for."""
    try:
        data, about = unpacked(message.content)
        reply, said = work(data, about, context.run_config, context.node_config)
    except HanseError as error:
        reply, said = b"", {"error": str(error)}
    return Message(packed(reply, said), reply_to=message)


def work(data: bytes, about: dict[str, Any], config: Any, node: Any) -> tuple[bytes, dict[str, Any]]:
    """The reply to a letter, and what is said beside it."""
    settings, client = Settings.read(None, tomllib.loads(str(config["settings"]))), int(node["client"])
    parts, own_data, seed = one_of_each(settings), Path(str(node.get("data", "data"))), settings.seed[0]
    name = run_name(settings)
    if about.get("run") != name:
        raise TransportError(f"run: this client is in run {name}, asked for {about.get('run')}")
    federation = with_own_data(settings, client, own_data)
    participant = Participant(
        federation,
        parts.methods[0],
        parts.codecs[0],
        parts.down,
        parts.engine,
        client=client,
        seed=seed,
        run=name,
        folder=Path("kept"),
    )
    if about["ask"] == "hello":
        return b"", participant.hello() | about_task(federation)
    if about.get("client") != client:
        raise TransportError(f"client: this is client {client}, asked was client {about.get('client')}")
    return participant.work(data, about), {"client": client, "run": name, "key": about["key"]}
